"""Which experts speak at a step: one file per rule. The table of names is in `trimtab.logits.registry`."""
