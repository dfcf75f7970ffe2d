"""Restoration of images with a known damage, by the energy of a denoiser and the likelihood of the observation."""
