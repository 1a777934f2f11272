"""Benchmarks of the node against nginx and against no proxy at all. Not part of the distribution."""
