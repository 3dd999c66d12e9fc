"""Layers and networks from papers, built on compiled formulas."""

__all__: list[str] = []
