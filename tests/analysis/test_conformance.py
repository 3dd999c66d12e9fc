"""The 22 checks of `normc.analysis.conformance`, and that each finds what is planted for it."""

import shutil
from functools import lru_cache

import pytest
import torch

import normc
from benchmarks.conformance import page
from normc.analysis import conformance as module
from normc.analysis.conformance import CHECKS, SHAPE, Result, Subject, conformance
from normc.language.axes import Axis
from normc.ops import batching, library, op, traced
from normc.ops.call import Call
from normc.ops.doors import Functional
from normc.ops.setting import Setting

pytestmark = pytest.mark.cpu

FORMULAS = {
    **{name: normc.zoo[name] for name in ("evonorm_b0", "evonorm_s0", "group_norm", "batch_norm")},
    **{name: normc.zoo[name] for name in ("add_rms_norm", "ada_layer_norm")},
    "nested": normc.parse("h = tanh(gamma*x - layer_mean(x)); h/batch_std(h) + beta"),
}
INDUCTOR = ("evonorm_b0", "add_rms_norm")
ALWAYS = INDUCTOR  # the others come with `make thorough`
NAMES = [
    pytest.param(name, marks=() if name in ALWAYS else pytest.mark.thorough) for name in FORMULAS
]
COMPILED = [check for check in CHECKS if check.compiled]


@lru_cache
def subject_of(name):
    return Subject(FORMULAS[name])


def checked(checks):
    return pytest.mark.parametrize("check", checks, ids=lambda c: f"{c.number}-{c.name}")


@checked([check for check in CHECKS if not check.compiled])
@pytest.mark.parametrize("name", NAMES)
def test_a_formula_conforms(name, check):
    check(subject_of(name))


@checked(COMPILED)
@pytest.mark.parametrize("name", NAMES)
def test_a_formula_conforms_compiled(name, check):
    check(subject_of(name), "aot_eager")


@checked(COMPILED)
@pytest.mark.parametrize("name", INDUCTOR)
@pytest.mark.thorough  # the page of the documentation is made with Inductor, for all of them
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs g++")
def test_a_formula_conforms_compiled_by_inductor(name, check):
    check(subject_of(name), "inductor")


# --- what a subject is --------------------------------------------------------------------------


def test_the_table_holds_the_checks_in_order():
    assert [check.number for check in CHECKS] == list(range(1, 23))
    assert [check.number for check in COMPILED] == list(range(9, 16))


@pytest.mark.parametrize("name", FORMULAS)
def test_every_tensor_counts(name):
    """No parameter is a scalar, and no gradient is zero, which would be right too easily."""
    subject = subject_of(name)
    for tensor, axes, slope in zip(subject.args, subject.axes, subject.gradient, strict=True):
        assert tensor.dtype == torch.float64 and axes & Axis.K and slope.abs().min() > 1e-6
    assert subject.args[0].shape == SHAPE


# --- what is planted: faults of normc's, each for the checks that have to find it ---------------


def no_tangents(patch):
    """Forward mode forgets what it is given."""
    true = Functional.jvp

    def jvp(ctx, *tangents):
        return tuple(t if t is None else torch.zeros_like(t) for t in true(ctx, *tangents))

    patch.setattr(Functional, "jvp", staticmethod(jvp))


def batches_in_front(patch):
    """vmap takes the batch to be the first dimension, wherever it is."""
    true = Functional.vmap

    def vmap(info, dims, *args):
        return true(info, tuple(d if d is None else 0 for d in dims), *args)

    patch.setattr(Functional, "vmap", staticmethod(vmap))


def batches_joined(patch):
    """A batch of batches counts as one batch, even in a statistic over samples."""
    patch.setattr(batching, "crosses", lambda program: False)


def twice_the_gradient(patch):
    """Backward drops a factor."""
    true = Call.backward
    patch.setattr(Call, "backward", lambda self, *how: tuple(2 * t for t in true(self, *how)))


def constant_gradient(patch):
    """A gradient that is differentiated again is a constant."""
    true = Setting.pulled

    def pulled(self, wrt, known, cotangents):
        return true(self, wrt, {n: t.detach() for n, t in known.items()}, cotangents)

    patch.setattr(Setting, "pulled", pulled)


def other_strides(patch):
    """Results lie in memory otherwise than a compiler is told."""
    true = library._room

    def room(*how):
        made = true(*how)
        return made.new_empty(made.shape[::-1]).permute(*reversed(range(made.dim())))

    patch.setattr(library, "_room", room)


def other_operations(patch):
    """The plain operations, which a compiler transforms, have another eps."""
    true = traced.composite
    patch.setattr(traced, "composite", lambda *how: true(*how[:-1], 1.01 * how[-1]))


def bound_to_a_size(patch):
    """Many samples are compiled otherwise than few."""
    true = op.traced

    def bound(formula, backend, given, *how):
        eps = 1.0 if given["x"].shape[0] > 4 else 1
        return [t * eps for t in true(formula, backend, given, *how)]

    patch.setattr(op, "traced", bound)


def broken_graph(patch):
    """Something on the way cannot be traced."""
    true = op.traced

    def broken(*how):
        torch._dynamo.graph_break()
        return true(*how)

    patch.setattr(op, "traced", broken)


def another_eps(patch):
    """Kernels are a little off."""
    true = Call.forward
    patch.setattr(Call, "forward", lambda self, given, eps: true(self, given, 1.01 * eps))


def computed_twice(patch):
    """What was saved is computed again."""
    true = library.outputs

    def outputs(*how):
        true(*how)
        return true(*how)

    patch.setattr(library, "outputs", outputs)


PLANTED = [
    (no_tangents, "evonorm_s0", (3, 5, 18, 19), "not close|forward mode mismatch"),
    (batches_in_front, "evonorm_s0", (6,), "groups=2 does not divide the 3 channels"),
    (batches_joined, "batch_norm", (4, 6, 8), "not close"),
    (twice_the_gradient, "evonorm_s0", (10, 16, 17, 18, 21), "not close|Jacobian mismatch"),
    (constant_gradient, "evonorm_s0", (8, 19), "not close|Jacobian mismatch"),
    (other_strides, "evonorm_s0", (20, 21, 22), "test_faketensor failed .*Stride mismatch"),
    (other_operations, "evonorm_s0", (12, 13, 14, 15), "not close"),
    (bound_to_a_size, "evonorm_s0", (11,), "compiled again for another shape"),
    (broken_graph, "evonorm_s0", (9, 12, 16), "graph_break"),
    (another_eps, "evonorm_s0", (1, 2, 7, 9), "not close"),
    (computed_twice, "evonorm_s0", (17,), "it ran .*forward.*forward.*backward"),
]
ROWS = [
    pytest.param(plant, name, number, message, id=f"{plant.__name__}-{number}")
    for plant, name, numbers, message in PLANTED
    for number in numbers
]


@pytest.mark.parametrize(("plant", "name", "number", "message"), ROWS)
def test_a_check_finds_what_is_planted(plant, name, number, message, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(Exception, match=f"(?s){message}"):
        CHECKS[number - 1](Subject(FORMULAS[name]), "aot_eager")


def test_something_is_planted_for_every_check():
    assert {number for row in PLANTED for number in row[2]} == set(range(1, 23))


# --- all of them --------------------------------------------------------------------------------


def test_what_a_check_finds_is_a_result(monkeypatch):
    monkeypatch.setattr(module, "CHECKS", CHECKS[:3])
    no_tangents(monkeypatch)
    found = conformance("x*gamma", "aot_eager")
    assert [result.check for result in found] == ["forward", "func.grad", "jvp"]
    assert [result.ok for result in found] == [True, True, False]
    assert [bool(result.error) for result in found] == [False, False, True]
    assert found[2].error.startswith("AssertionError: ") and found[2].seconds > 0


def test_a_text_that_is_no_formula_fails_every_check():
    found = conformance("x/gruop_std(x)")
    assert len(found) == 22
    assert all(not r.ok and r.error.startswith("FormulaError: ") for r in found)


def test_the_page_has_a_row_per_check_and_a_note_per_error():
    formulas = [normc.zoo["grn"], normc.Formula("x", "own")]
    fine = [Result(check.name, True, "", 0.1) for check in CHECKS]
    wrong = [*fine[:20], *[Result(c.name, False, "Error: a\nb", 0.1) for c in CHECKS[20:]]]
    text = page(formulas, [fine, wrong], "aot_eager")
    assert "|  | check | `grn` | `own` |" in text and "`own` is `x`." in text
    assert (
        "| 1 | forward | ok | ok |" in text
        and "| 22 | opcheck of tangent | ok | fails [1] |" in text
    )
    assert text.count("Error") == 1 and text.endswith("\n[1] `Error: a`\n")
