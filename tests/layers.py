"""Layers of the zoo for dear tests: of those with like plans, `make test` takes one."""

import pytest

import normc
from normc.pipeline import programs


def _likeness(name):
    """Of layers that agree in it plans are alike: statistics with their axes, inputs, results."""
    f = normc.zoo[name]
    stats = programs(f.definition, ()).source.stats
    return (
        tuple(sorted((s.op, s.over.value) for s in stats)),
        tuple(sorted(i.axes.value for i in f.inputs)),
        len(f.definition.results),
    )


def _leaders():
    first = {}
    for name in normc.zoo:
        first.setdefault(_likeness(name), name)
    return tuple(first.values())


LEADERS = _leaders()


def every_layer():
    """The names of all layers as parameters of a test; all but the first of a kind are thorough."""
    return [
        pytest.param(name, marks=() if name in LEADERS else pytest.mark.thorough)
        for name in normc.zoo
    ]
