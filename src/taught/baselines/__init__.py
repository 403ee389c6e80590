"""Cheap values of an example that every method has to beat."""
