"""Data: which images (sources), which ones when (sampling), how they reach the device (pipeline)."""
