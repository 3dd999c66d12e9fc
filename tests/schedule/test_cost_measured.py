"""Elements read, counted while Triton's interpreter runs kernels: as many as the cost says.

A launch of programs that meet is repeated by the interpreter, once per meeting, so cluster is left
out: test_cost.py counts in its text.
"""

import importlib
from collections import Counter

import pytest

import normc
from normc.analysis.agreement import LAYOUTS, Case, draw
from normc.backends import triton
from normc.language.axes import FULL
from normc.ops.explain import all_jobs
from normc.pipeline import Target
from normc.schedule.cost import ways
from normc.schedule.schedule import CHANNELS_FIRST, CHANNELS_LAST
from tests.backends.schedules import small

pytestmark = [
    pytest.mark.interpret,
    # numpy runs the kernels, and tells of what happens in lanes that are masked
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6
]

ORDERS = {"channels-first": CHANNELS_FIRST, "channels-last": CHANNELS_LAST}
BY_NAME = {layout.name: layout for layout in LAYOUTS}


@pytest.fixture
def read(monkeypatch):
    """The addresses that kernels have read since the counter was last cleared."""
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    load, seen = builder.create_masked_load, Counter()

    def counting(self, pointers, mask, *others):
        seen.update(pointers.data[mask.data.astype(bool)].tolist())
        return load(self, pointers, mask, *others)

    monkeypatch.setattr(builder, "create_masked_load", counting)
    return seen


def times(tensor, read):
    """How often each element of a tensor was read, all of them as often."""
    first, size = tensor.data_ptr(), tensor.element_size()
    counts = {read[first + size * i] for i in range(tensor.numel())}
    assert len(counts) == 1
    return counts.pop()


@pytest.mark.parametrize("schedule", ["resident", "streaming", "split"])
@pytest.mark.parametrize("layout", ORDERS)
@pytest.mark.parametrize("name", ["evonorm_s0", "evonorm_b0", "batch_norm", "rms_norm", "dyt"])
def test_every_element_is_read_as_often_as_is_counted(name, layout, schedule, read):
    formula, case = normc.zoo[name], Case(BY_NAME[layout], (2, 4, 3, 2), 2, "float32", 3)
    known, cotangents = draw(formula.definition, case)
    backend = triton.TritonBackend(small(schedule))
    for job in all_jobs(formula, Target("triton", "float32", ORDERS[layout])):
        (run,) = backend.load([job], [backend.render(job)])
        given = {i.name: known[i.name] for i in job.plan.program.inputs}
        read.clear()
        known |= run(case.geometry, given, 1e-5)
        known |= {"d_y": cotangents[0]}
        found = ways(job.plan, job.dense)
        traffic = {"resident": found.once, "streaming": found.streaming, "split": found.split}
        wanted = Counter(v.name for v in traffic[schedule].reads if v.axes == FULL)
        assert wanted == {name: times(given[name], read) for name in wanted}
