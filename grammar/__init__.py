"""The grammar of formulas, a data file: shipped as the package `normc.grammar`."""
