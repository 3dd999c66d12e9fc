"""C text: indented lines, loops and the words around them."""

from __future__ import annotations

from normc.language.axes import Axis, members, show
from normc.schedule.plan import Kernel, Sweep


class Lines:
    """Text with indentation that follows the braces."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._depth = 0

    def add(self, *lines: str) -> None:
        """Append lines, each indented by the braces open before it."""
        for line in lines:
            if line.startswith("}"):
                self._depth -= 1
            self.lines.append("  " * self._depth + line if line else "")
            if line.endswith("{"):
                self._depth += 1

    def close(self, count: int = 1) -> None:
        """Close as many braces."""
        self.add(*["}"] * count)


def index(axis: Axis) -> str:
    """The loop variable of an axis."""
    return str(axis.name).lower()


def loop(axis: Axis, size: str = "") -> str:
    """The head of the loop over an axis, which is as long as it is unless a size is given."""
    i = index(axis)
    return f"for (i64 {i} = 0; {i} < {size or axis.name}; {i}++) {{"


def threads(instances: str) -> str:
    """What follows `omp parallel for`: no more threads than instances."""
    return f"schedule(static) num_threads(least(threads, {instances})) if(threads > 1)"


def count(axes: Axis) -> str:
    """The number of elements over axes, as a factor."""
    names = [str(a.name) for a in members(axes)]
    return f"({'*'.join(names)})" if len(names) > 1 else "".join(names) or "1"


def instances(kernel: Kernel) -> str:
    """How often a kernel runs, in words."""
    return f"one instance per ({show(kernel.grid)})" if kernel.grid else "a single instance"


def describe(sweep: Sweep) -> list[str]:
    """A comment on what a sweep computes and reads."""
    what = ", ".join(f"{s.name} = {s.op}[{show(s.over)}]" for f in sweep.folds for s in f.stats)
    what = what or "write " + ", ".join(w.name for w in sweep.writes)
    if sweep.carries:
        what += "; carry " + ", ".join(s.name for s in sweep.carries)
    if sweep.keeps:
        what += "; keep " + ", ".join(k.name for k in sweep.keeps)
    return [f"/* {what}; reads {', '.join(v.name for v in sweep.reads) or 'nothing'} */"]
