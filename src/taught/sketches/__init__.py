"""Projected gradients that are kept, and what can be asked of them."""
