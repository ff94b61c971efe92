"""Pure maths on tensors and the exception tree: imports torch and nothing of trimtab's other rooms."""
