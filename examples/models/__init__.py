"""Models that the examples and benchmarks train."""
