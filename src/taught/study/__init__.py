"""The study: one question, as a file."""
