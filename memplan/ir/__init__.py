"""The captured step as data: programs, schedules, and what they take of memory. No torch."""
