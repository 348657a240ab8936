"""mlframework: meta-learning research on today's PyTorch."""

__version__ = "0.1.0"
