"""One step, from what was asked for to what runs."""
