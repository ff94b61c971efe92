"""Fusion of next-token logits: a strong model steered by the deltas of small experts."""
