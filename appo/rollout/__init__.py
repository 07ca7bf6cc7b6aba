"""Sampling responses, and rewarding them."""
