"""The replacement for the user's module, which runs emitted steps."""
