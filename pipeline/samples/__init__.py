"""Samples: every benchmark in one schema."""
