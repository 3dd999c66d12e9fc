"""Compiled layers measured: agreement with the oracle."""
