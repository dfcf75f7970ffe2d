"""Features of frozen networks, and classifiers on these features."""
