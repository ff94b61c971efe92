"""Dynamic Logits Fusion beside its rivals on the embedded zoo, with one expert per task and with all at once."""
