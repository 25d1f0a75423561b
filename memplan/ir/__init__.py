"""The captured step as data: programs, schedules, and their memory. No torch."""
