"""Slow, plain reference implementations that the tests compare the project's code with."""
