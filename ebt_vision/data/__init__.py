"""Images and text: found, decoded, ordered, written."""
