"""One interface over every way to denoise an image."""
