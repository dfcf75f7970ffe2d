"""Images and text: finding, decoding, ordering, writing."""
