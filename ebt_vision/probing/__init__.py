"""Linear probes on frozen features: labels and splits, heads, scores, reports."""
