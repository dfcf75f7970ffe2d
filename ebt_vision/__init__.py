"""Energy-Based Transformers for vision: train, compare, denoise."""

__version__ = "0.1.0"
