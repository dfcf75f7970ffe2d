"""From clean images to noisy ones."""
