"""Benchmarks: one table of shapes, the peers, and the report that writes the README's numbers."""
