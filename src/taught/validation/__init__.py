"""Ground truth by retraining: what training on chosen pairs does to the read-outs."""
