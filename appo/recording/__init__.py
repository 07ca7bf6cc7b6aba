"""Recording frame mass in a model's forward: which key is which frame, which layers, which visible keys."""
