"""Regularizers: four slots, sampled first and applied after (see docs/design.md)."""
