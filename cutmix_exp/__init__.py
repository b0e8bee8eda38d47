"""Reproducible experiments with CutMix and the regularizers it is compared with."""

__version__ = "0.1.0"
