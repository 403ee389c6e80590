"""From residuals to features: autoencoders, pooling, selection, labels."""
