"""What stands in the place of the user's module, and runs emitted steps."""
