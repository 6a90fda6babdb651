"""Tests of pipeline/reporting, on made-up results."""
