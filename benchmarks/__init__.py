"""Benchmarks; results are in README.md."""
