"""The metrics of a step: C in < C^-1 grad L, grad F >."""
