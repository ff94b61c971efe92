"""How much of an expert's delta is added: one file per rule. The table of names is in `trimtab.logits.registry`."""
