"""The method: from frame mass to target frames, slots, token weights, and advantages."""
