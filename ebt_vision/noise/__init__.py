"""Noise processes: clean images to noisy images."""
