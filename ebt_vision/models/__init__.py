"""The models; import them from their own files."""
