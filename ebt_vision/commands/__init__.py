"""The commands of ebt-vision."""
