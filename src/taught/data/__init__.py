"""Evaluation prompts and fine-tuning examples: reading, checking, overlap, chat templates."""
