"""The tape backend: the oracle's values from tapes, and tapes that can be read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import normc
from normc.analysis.agreement import LAYOUTS, Case, cases, compare
from normc.backends import contract
from normc.backends.tape_assembler import assemble
from normc.backends.tape_machine import BLOCK, opcodes
from normc.language.axes import AXIS_SETS
from normc.language.primitives import PRIMITIVES
from normc.language.reductions import REDUCTIONS
from normc.ops.explain import all_jobs
from normc.pipeline import Target
from tests.properties.formulas import formulas

SHAPES = {2: (6, 24), 3: (3, 24, 5), 4: (3, 12, 7, 5), 5: (2, 8, 3, 2, 5)}


def agree(text: normc.Formula | str, case: Case) -> None:
    for error in compare(text, case, "tape"):
        assert error.ok, (text, case.show(), error)


@pytest.mark.cpu
@pytest.mark.parametrize("name", normc.zoo)
def test_zoo_agrees_with_the_oracle(name: str) -> None:
    for i, layout in enumerate(LAYOUTS):
        shape = SHAPES[layout.rank] if layout.name != "tokens" else (3, 5, 24)
        agree(normc.zoo[name], Case(layout, shape, 4, ("float64", "float32")[i % 2], 7))


@pytest.mark.cpu
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_blocks_of_every_size(size: int) -> None:
    text = "(x - instance_mean(x))/instance_std(x) + v*layer_max(x)*x/(1 + instance_l1(x))"
    for shape in ((2, 3, size), (size, 3, 2)):
        agree(text, Case(LAYOUTS[5], shape, 1, "float64", 3))


@pytest.mark.cpu
@pytest.mark.parametrize("stat", REDUCTIONS)
def test_every_statistic_over_every_axis_set(stat: str) -> None:
    for axes, case in zip(AXIS_SETS, cases(seed=5, count=7, dtypes=["float64"]), strict=True):
        agree(f"x*{axes}_{stat}(v*x)", case)


@pytest.mark.cpu
def test_random_formulas() -> None:
    layouts = [Case(x, SHAPES[x.rank], 3, "float64", 1) for x in LAYOUTS if x.rank in (4, 5)]

    @settings(max_examples=settings().max_examples // 2)
    @given(formulas())
    def check(text: str) -> None:
        for layout in layouts[:2]:
            agree(text, layout)

    check()


@pytest.mark.cpu
def test_many_threads_give_what_one_gives() -> None:
    op, before = normc.compile("x*sigmoid(v*x)/group_std(x)*gamma", "tape"), torch.get_num_threads()
    x, ones = torch.randn(8, 16, 32, 32), torch.ones(16)
    found: list[torch.Tensor] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(op(x, v=ones, gamma=ones))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.cpu
def test_where_it_cannot_run() -> None:
    backend = contract.find("tape")
    assert "not on cuda" in backend.why_not("float32", "cuda")
    assert "not float16" in backend.why_not("float16", "cpu")


# --- text -----------------------------------------------------------------------------------------


def test_golden_tape(golden) -> None:  # type: ignore[no-untyped-def]
    golden("evonorm_s0", normc.compile(normc.zoo["evonorm_s0"]).source("tape"))


def test_the_machine_has_every_core_function() -> None:
    core = {name for name, row in PRIMITIVES.items() if row.body is None}
    for dtype in ("float32", "float64"):
        known = {name.rpartition("_")[0] for name in opcodes(dtype)}
        assert core <= known


def test_a_tape_is_assembled_from_its_text() -> None:
    text = "s0 = 0.5\ns1 = eps\nkernel N K\n  load_s s2 @v\n  loop S\n    end\n  end\n"
    text = text.replace("    end\n  end\n", "  end\nend\n")
    tape = assemble(text, {"v": 3}, "float32")
    numbers = opcodes("float32")
    assert list(tape.scalars) == [0.5, "eps", 0.0] and tape.vectors == 0
    assert list(tape.code) == [
        *(numbers["kernel"], 25, 0b0010, 2, 0),  # K, then N: two bits each, from the innermost
        *(numbers["load_s"], 2, 3, 0, 0),
        *(numbers["loop"], 3, 15, 0, 0),
        *(numbers["end"], 0, 0, 0, 0),
        *(numbers["end"], 0, 0, 0, 0),
        numbers["end"],
    ]


def test_registers_are_used_again() -> None:
    (forward, _) = all_jobs(
        normc.parse("+".join(["sin(x)*cos(x)"] * 20)), Target("tape", "float32")
    )
    text = contract.find("tape").render(forward).text
    assert assemble(text, {"x": 0, "y": 1}, "float32").vectors <= 4
