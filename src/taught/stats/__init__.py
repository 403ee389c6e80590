"""Ranks, intervals, corrections: one of each."""
