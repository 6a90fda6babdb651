"""Thin command lines, one per DVC stage."""
