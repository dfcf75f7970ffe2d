"""Thinking, and the base of all other packages: generators, checks, metrics, files. It imports no model."""
