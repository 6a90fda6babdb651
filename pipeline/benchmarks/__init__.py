"""Benchmarks: a file for each kind, named by ``benchmarks.NAME.samples.kind`` of params.yaml."""
