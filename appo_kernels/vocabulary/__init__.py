"""Code shared by the operators on logits: tiles, passes over their rows, the output head."""
