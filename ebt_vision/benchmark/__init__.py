"""The denoising benchmark's parts: what its programs in eval/ are made of."""
