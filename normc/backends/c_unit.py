"""C units: the functions of several jobs in one file, for one run of the compiler.

A source stands on its own: heading, declarations, function. In a unit the declarations stand once,
below the first heading, and serve every function; each function stands below its own heading.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from normc.backends.c_spelling import declarations
from normc.backends.contract import Source

_END = " */\n"  # of a heading: no formula can hold it


def unit(sources: Sequence[Source], dtype: str) -> str:
    """One text for the sources of jobs of one dtype, whose names differ.

    >>> a = Source("/* a\\n */\\ntypedef float real;\\n\\nvoid a() {}\\n", "a", ".c")
    >>> b = Source("/* b\\n */\\ntypedef float real;\\n\\nvoid b() {}\\n", "b", ".c")
    >>> unit([a, b], "float32").count("real;")
    1
    """
    parts = [_parts(source) for source in sources]
    code = "\n".join(function for _, function in parts)
    (heading, function), *rest = parts
    texts = [f"{heading}{declarations(_calls(code), dtype)}\n\n{function}"]
    return "\n".join([*texts, *[heading + function for heading, function in rest]])


def _parts(source: Source) -> tuple[str, str]:
    """The heading of a source and its function, without what is declared between them."""
    heading, end, rest = source.text.partition(_END)
    return heading + end, rest[rest.index(f"\nvoid {source.entry}(") + 1 :]


def _calls(code: str) -> str:
    """The functions a text calls, which is all that its declarations depend on."""
    return " ".join(f"{name}(" for name in dict.fromkeys(re.findall(r"\b(\w+)\(", code)))
