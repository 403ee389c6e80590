"""Kinds of targets, one file for what belongs together."""
