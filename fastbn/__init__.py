"""fastbn: batch normalization as fast as memory allows, on CPU and GPU."""

__version__ = "0.1.0"
