"""Tape code: a plan as instructions for the machine of `normc.backends.tape_machine`.

It walks Kernel and Sweep as a printer of source does. Values that vary along the innermost loop are
vectors, all others scalars, computed in the loop where they are known. Statistics are folded block
by block and merged in double, always in the same order.

    kernel N G          once per index over N and G, as far as its `end`
    load_s s4 s0        a scalar from the tensor s0, at the indices in scope
    loop K              once per index over K
    blocks S s1         512 elements of S at a time, how many of them in s1
    load_v v0 x         a vector
    mul_sv v1 s4 v0
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from normc.backends.c_spelling import WIDE
from normc.backends.contract import Job
from normc.backends.emit import expand
from normc.backends.tape_machine import spelling
from normc.language.axes import NONE, Axis
from normc.language.expr import Call, Const, Expr, Var, postorder, var
from normc.language.reductions import COUNT, REDUCTIONS, E, State
from normc.program.program import is_scalar
from normc.schedule.plan import Fold, Kernel, Sweep

Step = tuple[str, ...]
"""An instruction and its operands: registers ``s0`` and ``v0``, tensors, axes."""

Levels = list[list[Step]]


def tape(job: Job) -> str:
    """The text of a job's tape."""
    return _Writer(job).text()


class _Writer:
    """The instructions of one job, and the scalars that are known before they run."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.steps: list[Step] = []
        self.scalars = 0
        self._fixed: dict[str, str] = {}  # the registers of numbers, eps and counts
        for kernel in job.plan.kernels:
            self._kernel(kernel)

    def text(self) -> str:
        """What registers hold at the start; the instructions, one a line, indented by loops."""
        lines: list[str] = []
        depth = 0
        for name, *operands in self.steps:
            depth -= name == "end"
            lines.append("  " * depth + " ".join([name, *operands]))
            depth += name in ("kernel", "loop", "blocks")
        return "\n".join([*(f"{r} = {value}" for value, r in self._fixed.items()), *lines])

    # --- registers -------------------------------------------------------------------------------
    def scalar(self) -> str:
        """A register of its own."""
        self.scalars += 1
        return f"s{self.scalars - 1}"

    def fixed(self, value: float | Var) -> str:
        """The register of a number, eps or a count."""
        text = value.name if isinstance(value, Var) else repr(float(value))
        if text not in self._fixed:
            self._fixed[text] = self.scalar()
        return self._fixed[text]

    # --- kernels ---------------------------------------------------------------------------------
    def _ordered(self, axes: Axis) -> list[Axis]:
        return [a for a in self.job.plan.order if a & axes]

    def _kernel(self, kernel: Kernel) -> None:
        grid = self._ordered(kernel.grid)
        self.steps.append(("kernel", *(str(a.name) for a in grid)))
        for sweep in kernel.sweeps:
            nest = _Nest(self, kernel.grid, self._ordered(sweep.rows), self._ordered(sweep.cols))
            self.steps += nest.folded(sweep) if sweep.folds else nest.written(sweep)
        self.steps.append(("end",))


class _Nest:
    """The loops of one sweep, and what is known in them."""

    def __init__(self, tape: _Writer, grid: Axis, rows: list[Axis], cols: list[Axis]) -> None:
        self.tape = tape
        self.rows, self.loops = rows, [*rows, *cols]
        self.depths = [grid, *self.loops]
        self.levels: Levels = [[] for _ in self.depths]
        self.along = self.loops[-1] if self.loops else NONE  # the axis of vectors
        self.count = tape.scalar()  # elements of the block
        self.known: dict[int, str] = {}
        self.alive: list[Expr] = []  # what the ids in `known` belong to
        self.vectors = 0

    def written(self, sweep: Sweep) -> list[Step]:
        values = self.values([w.expr for w in sweep.writes])
        stores = self.levels[-1]
        for w, value in zip(sweep.writes, values, strict=True):
            if self.loops:
                value = self.vector(value, stores)
            stores.append((f"store_{value[0]}", f"@{w.name}", value))
        return self.nested(0)

    def folded(self, sweep: Sweep) -> list[Step]:
        values = self.values([f.arg for f in sweep.folds])
        inner, before, after = self.levels[-1], self.levels[len(self.rows)], list[Step]()
        seen = self.tape.scalar()
        before.append(("copy_w", seen, self.tape.fixed(0.0)))
        for fold, value in zip(sweep.folds, values, strict=True):
            totals = {f.name: self.tape.scalar() for f in fold.state.folds}
            before += [("copy_w", r, self.tape.fixed(0.0)) for r in totals.values()]
            parts = self.parts(fold.state, self.vector(value, inner), inner)
            self.merge(fold.state, totals, parts, seen, inner)
            after += self.finished(fold, totals, seen)
        inner.append(("add_ww", seen, seen, self.count))
        some: list[Step] = [("max_ww", seen, seen, self.tape.fixed(1.0))]  # of an empty batch
        return self.nested(0, [*some, *after])

    def nested(self, level: int, after: Sequence[Step] = ()) -> list[Step]:
        """The code of a level and all below; ``after`` comes where the loops of columns end."""
        if level == len(self.loops):
            return _packed(self) if self.loops else [*self.levels[0], *after]
        axis = str(self.loops[level].name)
        last = level == len(self.loops) - 1
        head: Step = ("blocks", axis, self.count) if last else ("loop", axis)
        here = after if level == len(self.rows) else ()
        below = self.nested(level + 1, after if level < len(self.rows) else ())
        return [*self.levels[level], head, *below, ("end",), *here]

    # --- values ----------------------------------------------------------------------------------
    def values(self, exprs: Sequence[Expr]) -> list[str]:
        """The registers of expressions, computed each at its level."""
        roots = expand(exprs, spelling(self.tape.job.dtype))
        self.alive += roots
        for node in postorder(roots):
            if id(node) not in self.known:
                level = self.levels[self.level(node.axes)]
                self.known[id(node)] = self.value(node, self.known, level)
        return [self.known[id(root)] for root in roots]

    def level(self, axes: Axis) -> int:
        bound = NONE
        for i, more in enumerate(self.depths):
            bound |= more
            if not axes & ~bound:
                return i
        raise AssertionError(f"{axes} is not bound by {self.depths}")

    def value(self, node: Expr, known: Mapping[int, str], out: list[Step], kind: str = "s") -> str:
        """Add the instruction that computes a node from its operands."""
        match node:
            case Const(number):
                return self.tape.fixed(number)
            case Var(name, axes):
                if is_scalar(name):
                    return self.tape.fixed(node)
                to = self.fresh(bool(axes & self.along))
                out.append((f"load_{to[0]}", to, f"@{name}"))
                return to
            case Call(fn, args):
                operands = [known[id(a)] for a in args]
                if len(args) == 3 and any(o[0] == "v" for o in operands):
                    operands = [self.vector(o, out) for o in operands]
                kinds = "".join("v" if o[0] == "v" else kind for o in operands)
                to = self.fresh("v" in kinds)
                out.append((f"{fn}_{kinds}", to, *operands))
                return to
            case _:
                raise AssertionError("a Program holds no Reduce")

    def fresh(self, vector: bool) -> str:
        if not vector:
            return self.tape.scalar()
        self.vectors += 1
        return f"v{self.vectors - 1}"

    def vector(self, register: str, out: list[Step]) -> str:
        """The register itself, or a vector full of the scalar."""
        if register[0] == "v":
            return register
        to = self.fresh(True)
        out.append(("fill_s", to, register))
        return to

    # --- statistics ------------------------------------------------------------------------------
    def parts(self, state: State, element: str, out: list[Step]) -> dict[str, str]:
        """Fold one block: the registers of a state's numbers."""
        found: dict[str, str] = {}
        for fold in state.folds:
            known = {E: element, COUNT: self.count}
            known |= {var(name): register for name, register in found.items()}
            each = self.vector(self.spelled(fold.each, known, out, "s"), out)
            found[fold.name] = self.tape.scalar()
            out.append((f"{fold.op}_v", found[fold.name], each))
        return found

    def merge(
        self,
        state: State,
        totals: dict[str, str],
        parts: dict[str, str],
        seen: str,
        out: list[Step],
    ) -> None:
        """Merge a block's numbers into the running ones; the first block is taken as it is."""
        a = {name: var(f"a {name}") for name in parts}
        b = {name: var(f"b {name}") for name in parts}
        na, nb = var("na"), var("nb")
        known: dict[Var, str] = {na: seen, nb: self.count}
        for name in parts:
            known |= {a[name]: totals[name], b[name]: parts[name]}
        merged = state.merge(a, b, na, nb)
        done = {name: self.spelled(merged[name], known, out, "w") for name in parts}
        first = self.tape.scalar()
        out.append(("eq_ww", first, seen, self.tape.fixed(0.0)))
        for name in parts:
            out.append(("where_www", totals[name], first, parts[name], done[name]))

    def finished(self, fold: Fold, totals: dict[str, str], seen: str) -> Iterator[Step]:
        """Turn a state into the statistics and store them."""
        known = {var(f"a {name}"): register for name, register in totals.items()}
        known[var("na")] = seen
        for stat in fold.stats:
            rule = REDUCTIONS[stat.op].finish
            assert rule is not None
            out: list[Step] = []
            value = rule({name: var(f"a {name}") for name in totals}, var("na"))
            register = self.spelled(value, known, out, "w")
            yield from out
            yield ("store_s", f"@{stat.name}", register)

    def spelled(self, expr: Expr, known: Mapping[Var, str], out: list[Step], kind: str) -> str:
        """An expression over a state's numbers."""
        how = WIDE if kind == "w" else spelling(self.tape.job.dtype)
        (root,) = expand([expr], how)
        registers = {id(v): register for v, register in known.items()}
        for node in postorder([root]):
            if id(node) not in registers:
                registers[id(node)] = self.value(node, registers, out, kind)
        return registers[id(root)]


def _packed(nest: _Nest) -> list[Step]:
    """The code of a block in few vector registers: one is free again after its last use."""
    steps, last = nest.levels[-1], dict[str, int]()
    for i, step in enumerate(steps):
        last |= {o: i for o in step[1:] if o[0] == "v"}
    places: dict[str, str] = {}
    free: list[str] = []
    done: list[Step] = []
    for i, step in enumerate(steps):
        used = [o for o in dict.fromkeys(step[1:]) if o[0] == "v"]
        old = {o: places[o] for o in used if o in places}
        free += [old[o] for o in old if last[o] == i]
        for o in used:
            if o not in places:
                places[o] = free.pop() if free else f"v{len(set(places.values()))}"
        done.append((step[0], *[places.get(o, o) for o in step[1:]]))
    return done
