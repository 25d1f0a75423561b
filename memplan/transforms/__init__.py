"""Passes: what they may do, and how they change a module."""
