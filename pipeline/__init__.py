"""Learned KV-cache eviction: the library behind the DVC stages.

Data flows one way: source -> samples -> traces -> policy -> evaluation -> report.
Nothing here parses a command line or decides where an output lives.
"""
