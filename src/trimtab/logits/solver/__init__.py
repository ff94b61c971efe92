"""The tilted family p_a = p exp(a d) / Z(a), and the alpha at which it moved as far as tuning moved the small model."""
