"""Estimators of the effect of training pairs on targets."""
