"""Rank a cache, keep a budget, evict for real."""
