"""Fine-tuning on some of the examples."""
