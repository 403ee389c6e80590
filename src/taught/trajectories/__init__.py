"""The legs of a training run that effects are summed over."""
