"""Benchmarks of speed: one script per hot path, each prints ratios measured in one run (docs/PERFORMANCE.md)."""
