"""Plans to callables: one file per backend, found by its name."""
