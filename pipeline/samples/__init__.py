"""Samples: every corpus in one schema."""
