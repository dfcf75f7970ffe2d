"""Thinking, and what everything else stands on: generators, checks, metrics, files. Knows torch, and no model."""
