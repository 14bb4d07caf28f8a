"""The chosen experts of every token."""
