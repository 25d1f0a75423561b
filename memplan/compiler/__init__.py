"""The compiler of one step, from a request to what runs."""
