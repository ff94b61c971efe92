"""Whether there is anything to transfer in the embedded zoo, before any fused score is looked at."""
