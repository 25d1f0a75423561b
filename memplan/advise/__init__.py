"""Ways to make a step fit: freezing, techniques, the largest batch."""
