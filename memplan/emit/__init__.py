"""Schedules as code."""
