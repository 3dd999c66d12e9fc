"""Schedules with tiles of a test's own choice: smaller than any tensor, so that all is shared."""

from math import prod

from normc.backends.tiles import forms
from normc.backends.tiling import Config, ceiling


def small(schedule, extent=2, warps=1):
    """A choice for the Triton backend: every kernel under one schedule, with tiles of ``extent``.

    What a program holds whole is as large as it must be; a program of a split walks two tiles along
    each dimension.
    """

    def choose(job, kernel, geometry, machine):
        found = forms(job, kernel)
        wanted = found.get(schedule, found["resident"])
        return [tuple(configure(form, geometry, extent, warps) for form in wanted)]

    return choose


def configure(form, geometry, extent, warps):
    sizes = {d: max(1, geometry.count(d.axes)) for d in form.dims}
    whole = set(form.free) if form.resident and not form.shared else set()
    extents = {d: min(extent, ceiling(sizes[d])) for d in form.dims}
    blocks = {d.block(i): ceiling(sizes[d]) if d in whole else extents[d] for d, i in form.blocks}
    if form.shared:
        shares = {d: extents[d] if form.resident else 2 * extents[d] for d in form.free}
        parts = {d: -(-sizes[d] // shares[d]) for d in form.free}
        blocks |= {d.parts: n for d, n in parts.items()}
        blocks |= {} if form.resident else {d.share: n for d, n in shares.items()}
        blocks |= {
            name: ceiling(prod(parts[d] for d in form.along(form.kernel.sweeps[i].cols)))
            for i, name in form.merges.items()
        }
    return Config.of(form, blocks, warps, {d.letter: n for d, n in sizes.items()})
