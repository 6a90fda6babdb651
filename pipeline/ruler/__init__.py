"""NVIDIA's RULER generator."""
