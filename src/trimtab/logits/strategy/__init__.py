"""A strategy: an amount (how much of an expert's delta is added) and a chooser (which experts speak)."""
