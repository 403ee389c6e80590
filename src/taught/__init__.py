"""Which training examples taught a model a behavior, and through which of its features."""
