"""Speculative fusion: small members draft, all members verify at once, and the text has exactly the fused distribution.

verify      accept, resample, bonus: the maths of one round
draft       who drafts, and from which distribution
length      how many tokens a draft should have
ragged      what each member has read of each row, when every row accepts another number of tokens
processors  temperature, top-p and the other processors of `generate`, for all positions of a draft
rows        the texts themselves: what was emitted, what has ended
decode      the rounds
plan        the settings, and what cannot be speculated
"""
