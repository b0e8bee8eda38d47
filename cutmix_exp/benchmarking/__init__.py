"""Speed beside the alternatives: see scripts/benchmark.py."""
