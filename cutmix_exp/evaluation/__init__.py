"""Evaluators: they read a network and data, and change neither."""
