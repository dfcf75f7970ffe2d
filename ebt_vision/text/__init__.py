"""Generation with the text models."""
