"""Passes: their interface, and their changes of a module."""
