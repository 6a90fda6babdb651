"""Baselines of our own: what kvpress lacks, or gives only for one compression ratio. A file each."""
