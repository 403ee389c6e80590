"""Ground truth by retraining: what training on chosen examples does to the read-outs."""
