"""Running the members: which are read in one forward, their caches, and the prompts that each of them reads."""
