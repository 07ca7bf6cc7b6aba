"""The method: from frame mass to key frames, slots, token weights, and advantages."""
