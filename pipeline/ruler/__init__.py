"""NVIDIA's RULER generator: its wheel, its scripts, and splits that share nothing."""
