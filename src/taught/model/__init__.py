"""The language model: loading, read-outs, gradients."""
