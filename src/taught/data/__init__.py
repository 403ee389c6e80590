"""Evaluation prompts and fine-tuning pairs: reading, checking, overlap, chat templates."""
