"""Expressions to programs: flatten, tidy, differentiate."""
