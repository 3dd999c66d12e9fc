"""Callables to torch ops and layers."""
