"""Tile shares: how programs that share an instance hand each other the states of their reductions.

The numbers of a fold's state lie in tensors of normc's own, ``s0_t_parts``: dense over what the
statistic keeps, then over the programs along the reduced axes. Programs of a cluster wait until all
have stored theirs, and each merges them, in the order in which they lie; those of a split sweep
end, and a small kernel merges them. The same bits come out whichever program came first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from normc.backends.emit import expand, write
from normc.backends.tile_scope import ARRIVED, FOLD, START, WAIT, Scope, expanded, span
from normc.backends.tile_spelling import spelling
from normc.backends.tile_states import finished, gathers_by_weight, values_of
from normc.backends.tiling import Dim, Form, finish_name, handed, union
from normc.language.axes import Axis, show
from normc.language.expr import Expr, var, variables
from normc.language.reductions import ALL, COUNT, count, whole
from normc.program.program import Stat
from normc.schedule.plan import Fold, Sweep

LOCAL = "_own"
"""Ends the names of a program's own state, where several programs share an instance."""

MEET = '''\
@triton.jit
def meet(arrived, programs, WAIT: tl.constexpr):
    """Go on when all programs of a cluster are here, and see what each has stored before.

    The count only grows, by one for each program and meeting: it need never be reset.
    """
    tl.debug_barrier()
    before = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    if WAIT:
        goal = (before // programs + 1)*programs
        while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < goal:
            pass
    tl.debug_barrier()'''


def parts_along(form: Form, axes: Axis) -> str:
    """The number of programs along ``axes``."""
    return "*".join(d.parts for d in form.along(axes)) or "1"


def share_of(form: Form) -> Callable[[Dim], str]:
    """What the number of indices that one program walks along a dimension is called."""
    return (lambda d: d.block()) if form.resident else (lambda d: d.share)


def hand_over(scope: Scope, sweep: Sweep, fold: Fold, names: Sequence[str]) -> None:
    """Store the numbers of a program's state where the other programs find them."""
    kept = scope.form.kernel.grid | sweep.rows
    part = ""
    for d in scope.form.along(sweep.cols):
        part = f"{_in_brackets(part)}*{d.parts} + {d.letter}_part" if part else f"{d.letter}_part"
    row, many = _in_brackets(scope.offset(kept)[0]), parts_along(scope.form, sweep.cols)
    place = f"{row}*{_in_brackets(many)} + {part}"
    for tensor, name in zip(handed(fold), names, strict=True):
        others = [d for d in scope.form.free if not d.axes & (kept | sweep.cols)]
        owned = [scope.mask(kept), *(f"({d.letter}_part == 0)" for d in others)]
        inside = " & ".join(filter(None, owned))
        scope.add(f"tl.store({tensor} + {place}, {name}{', ' + inside if inside else ''})")


def exchange(scope: Scope, sweeps: Mapping[int, Sweep]) -> None:
    """The programs of a cluster hand over what they have folded on chip, meet, and take it over."""
    form = scope.form
    cols = union(sweep.cols for sweep in sweeps.values())
    everyone = parts_along(form, union(d.axes for d in form.free))
    folds = [(sweep, fold) for sweep in sweeps.values() for fold in sweep.folds]
    with scope.branch(f"if {parts_along(form, cols)} > 1"):
        for sweep, fold in folds:
            names = [v.name for v in values_of(fold, LOCAL).values()]
            hand_over(scope, sweep, fold, names)
        scope.add(f"meet({ARRIVED} + tl.program_id(0)//({everyone}), {everyone}, {WAIT})")
        for i, sweep in sweeps.items():
            take_over(scope, i, sweep)
    with scope.branch("else"):
        for _, fold in folds:
            both = zip(values_of(fold).values(), values_of(fold, LOCAL).values(), strict=True)
            scope.add(*(f"{one.name} = {own.name}" for one, own in both))


def take_over(scope: Scope, i: int, sweep: Sweep) -> None:
    """Read the numbers of all programs' states, a tile of them along ``q``, and merge them."""
    form = scope.form
    kept, many = form.kernel.grid | sweep.rows, parts_along(form, sweep.cols)
    rows = scope.small(kept, "q")
    wide = [d for d in rows if not scope.one(d)]
    view = f"[{', '.join(['None'] * len(wide) + [':'])}]" if wide else ""
    scope.add(f"q = {span('0', form.merges[i])}{view}")
    row = _in_brackets(scope.dense(rows)) if rows else "0"
    inside = " & ".join([*filter(None, [scope.exists(rows)]), f"(q < {many})"])
    if any(gathers_by_weight(fold.state) for fold in sweep.folds):
        scope.add(f"held = {_held(scope.form, sweep.cols, scope.real)}")
    read = Gather(form, many, f"{row}*{_in_brackets(many)} + q", inside, len(wide))
    every = scope.count(sweep.cols) if gathers_any(sweep) else ""
    for fold in sweep.folds:
        scope.add(*read.lines(fold, every))
        wholes, owns = values_of(fold), values_of(fold, LOCAL)
        # Chosen against the program's own, NaN or not: so the result has the layout of that one,
        # where Triton would carry another layout to the whole tile.
        for v, own in zip(wholes.values(), owns.values(), strict=True) if wide else ():
            view, same = expanded(wide, form.tile), f"{own.name} == {own.name}"
            scope.add(f"{v.name} = tl.where({same}, {v.name}{view}, {own.name})")


def gathers_any(sweep: Sweep) -> bool:
    """Whether it matters for any fold of a sweep how many elements programs have folded."""
    return any(gathers_by_weight(fold.state) for fold in sweep.folds)


@dataclass(frozen=True)
class Gather:
    """How the numbers of states are read, one of each program along ``q``, and folded to one."""

    form: Form
    many: str  # how many programs there are
    place: str  # of the numbers
    inside: str  # the condition under which there are any
    along: int  # the dimension of q

    def lines(self, fold: Fold, every: str) -> list[str]:
        """The lines for one fold; ``every`` is how many elements all programs have folded."""
        parts, wholes = values_of(fold, "_q"), values_of(fold)
        again = f"[{':, ' * self.along}None]" if self.along else ""  # for use along q
        names: dict[int, str] = {id(COUNT): "held", id(ALL): every}
        alive: list[Expr] = [COUNT, ALL]  # an id is a node's as long as the node lives
        lines: list[str] = []
        for f, tensor in zip(fold.state.folds, handed(fold), strict=True):
            load = f'tl.load({tensor} + {self.place}, {self.inside}, 0.0, cache_modifier=".cg")'
            lines.append(f"{parts[f.name].name} = {load}")
            names |= {
                id(var(f.name)): parts[f.name].name,
                id(whole(f.name)): wholes[f.name].name + again,
            }
            alive += [var(f.name), whole(f.name)]
        known = spelling(self.form.job.dtype)
        for f in fold.state.gather:
            text = write(expand([f.each], known)[0], known, names)
            inside = f"tl.where(q < {self.many}, {text}, {START[f.op]})"
            lines.append(f"{wholes[f.name].name} = {FOLD[f.op].format(inside, self.along, '')}")
        return lines


def _held(form: Form, cols: Axis, real: str) -> str:
    """How many elements over ``cols`` the program numbered ``q`` along them has."""
    share, terms, q = share_of(form), list[str](), "q"
    for d in reversed(form.along(cols)):
        part = q if d is form.along(cols)[0] else f"({q} % {d.parts})"
        if not (form.resident and d.letter in form.single):
            terms.append(f"tl.minimum({share(d)}, {d.size} - {part}*{share(d)})")
        q = f"({q} // {d.parts})"
    return f"tl.cast({'*'.join(reversed(terms)) or '1 + 0*q'}, {real})"


def finish_sizes(form: Form, sweep: Sweep) -> tuple[Dim, ...]:
    """The dimensions whose sizes the kernel that finishes a split sweep is given."""
    counted = union(d.axes for d in form.along(sweep.cols))
    return tuple(d for d in form.sizes if d.axes & counted)


def finish_kernel(form: Form, i: int) -> str:
    """The kernel that merges what the programs of a split sweep have handed over."""
    sweep, real = form.kernel.sweeps[i], f"tl.{form.job.wide}"
    sizes, cols = finish_sizes(form, sweep), form.along(sweep.cols)
    stats = [s for fold in sweep.folds for s in fold.stats]
    rows = [
        [*(t for fold in sweep.folds for t in handed(fold)), *(f"{s.name}_ptr" for s in stats)],
        ["KEPT", *(d.size for d in sizes)],
        [f"{n}: tl.constexpr" for d in cols for n in (d.parts, d.share)],
        ["INDEX: tl.constexpr", "MERGE: tl.constexpr", "BLOCK: tl.constexpr"],
    ]
    what = ", ".join(f"{s.name} = {s.op}[{show(s.over)}]" for s in stats)
    many = parts_along(form, sweep.cols)
    lines = [
        f'"""{what}: the programs\' states merged, always in the same order."""',
        f"i = {span('tl.program_id(0)*BLOCK', 'BLOCK')}",
        f"q = {span('0', 'MERGE')}[None, :]",
        f"inside = (i[:, None] < KEPT) & (q < {many})",
    ]
    if gathers_any(sweep):
        lines.append(f"held = {_held(form, sweep.cols, real)}")
    read = Gather(form, many, f"i[:, None]*{_in_brackets(many)} + q", "inside", 1)
    for fold in sweep.folds:
        lines += read.lines(fold, _count(form, sweep.cols))
        lines += [_stored(form, fold, stat) for stat in fold.stats]
    head = [f"def {finish_name(form, i)}(", *(f"    {', '.join(row)}," for row in rows), "):"]
    return "\n".join(["@triton.jit", *head, *(f"    {line}" for line in lines)])


def _stored(form: Form, fold: Fold, stat: Stat) -> str:
    """The line that stores a statistic, finished from the numbers of its state."""
    values, over = values_of(fold), count(stat.over)
    value = finished(stat, values)
    names = {id(v): v.name for v in values.values()} | {id(over): _count(form, stat.over)}
    assert all(id(v) in names for v in variables([value])), "a state finishes by itself"
    text = write(value, spelling(form.job.dtype), names)
    return f"tl.store({stat.name}_ptr + i, {text}, i < KEPT)"


def _count(form: Form, axes: Axis) -> str:
    """The number of elements over ``axes``."""
    sizes = [d.size for d in form.sizes if d.axes & axes]
    return _in_brackets("*".join(f"tl.cast({size}, tl.{form.job.wide})" for size in sizes))


def _in_brackets(text: str) -> str:
    return text if text.isidentifier() else f"({text})"


__all__ = ["LOCAL", "MEET", "exchange", "finish_kernel", "hand_over", "share_of"]
