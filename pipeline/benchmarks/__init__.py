"""Metrics of the benchmarks, as their origins define them."""
