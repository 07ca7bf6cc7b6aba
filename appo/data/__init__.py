"""Records, their formats and media, and the prompts made of them."""
