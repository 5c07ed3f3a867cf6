"""Several runs: comparison, search, claims, benchmarks, statistics."""
