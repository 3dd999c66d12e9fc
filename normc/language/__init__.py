"""Text to expressions: the tables, the grammar, the checks; imports nothing above it."""
