"""`normc show`, the derivative as formulas, and op.explain: stable text of every stage."""

import pytest
import torch
from typer.testing import CliRunner

import normc
from normc.cli.main import app
from normc.language.parse import parse as parse_definition
from normc.language.show import show as show_definition
from normc.ops import explain
from normc.ops.derivative import derivatives, latex_derivatives, show_derivatives
from normc.pipeline import Target
from normc.reference import reference

STAGES = {
    # of EvoNorm-S0: what is in the text
    "parse": "n5 = std[K S] n0",
    "algebra": "d_beta = batch_sum(d_y)",
    "program": "s0 = var[K S] x",
    "backward": "d_x : N G K S <-",
    "plan": "fwd: floor 2A, streaming 3A",
    "c": "void evonorm_s0_backward(",
    "triton": "@triton.jit",
}


def run(*args):
    result = CliRunner().invoke(app, ["show", *args])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_alone_is_plain_stable_text(stage):
    text = run("evonorm_s0", "--stage", stage)
    assert STAGES[stage] in text
    assert "\x1b" not in text
    assert text == run("evonorm_s0", "--stage", stage)


@pytest.mark.aot
def test_machine_code_names_no_file_of_this_machine():
    text = run("x*gamma", "--stage", "ptx")
    assert ".target sm_90" in text
    assert "registers" in text
    assert ".file" not in text


def test_the_overview_has_a_heading_per_stage_in_order():
    text = run("evonorm_s0", "--no-color")
    places = [text.index(f"{stage}: ") for stage in [*STAGES, "ptx"]]
    assert places == sorted(places)


def test_the_overview_of_one_backend():
    text = run("x/group_std(x)", "--backend", "torch")
    assert "torch: plain torch operations" in text
    assert "@triton" not in text and "ptx" not in text


def test_layout_and_dtype_reach_the_kernels():
    assert "typedef double real" in run("x*gamma", "--stage", "c", "--dtype", "float64")
    first = run("rms_norm", "--stage", "c")
    assert first != run("rms_norm", "--stage", "c", "--layout", "channels-last")


def test_a_formula_without_a_gradient_says_so():
    assert "no result depends on any tensor" in run("sqrt(2)", "--stage", "backward")


def costs(*args):
    """What the plans of a formula move: the lines about forward and backward."""
    lines = run(*args, "--stage", "plan").splitlines()
    return [line.partition(" (small: ")[0] for line in lines if line.startswith(("fwd", "bwd"))]


def test_the_plan_of_triton_has_the_traffic_of_every_schedule():
    assert costs("evonorm_s0", "--backend", "triton") == [
        "fwd: floor 2A; resident, cluster 2A; streaming, split 3A",
        "bwd: floor 3A; resident, cluster 3A; streaming, split 5A",
    ]
    assert costs("evonorm_s0") == ["fwd: floor 2A, streaming 3A", "bwd: floor 3A, streaming 4A"]


def test_schedules_that_move_as_much_stand_together():
    fwd, bwd = costs("dyt", "--backend", "triton", "--layout", "channels-last")
    assert fwd == "fwd: floor 2A; resident, cluster, streaming, split 2A"
    assert bwd == "bwd: floor 3A; resident, cluster, streaming, split 3A"


def test_a_plan_above_its_floor_says_which_kernels_read_again():
    assert costs("batch_norm", "--backend", "triton", "--layout", "channels-last") == [
        "fwd: floor 2A; resident, cluster, streaming, split 3A; k0 and k2 each read x",
        "bwd: floor 3A; resident, cluster, streaming, split 5A; k0 and k2 each read d_y and x",
    ]
    _, bwd = costs("switchable_norm", "--backend", "triton")
    assert bwd.endswith("split 6A; k0, k1 and k2 each read d_y; k0 and k2 each read x")


def test_the_overview_has_the_schedules_of_the_backend_that_is_asked_for():
    assert "resident, cluster 2A" in run("evonorm_s0", "--backend", "triton")
    assert "resident" not in run("evonorm_s0", "--backend", "c")


# --- the derivative ------------------------------------------------------------------------------

FORMULAS = ["evonorm_s0", "evonorm_b0", "grn", "batch_norm", "add_rms_norm", "ada_layer_norm"]
BROADCAST = {0: (), 1: (1, -1, 1, 1), 2: (2, -1, 1, 1), 4: (2, 6, 3, 2)}  # by rank, for that x


def tensors(definition, x):
    """Random values for everything a definition needs."""
    generator = torch.Generator().manual_seed(1)
    n, c = x.shape[:2]
    shapes = {"": (), "GK": (c,), "NGK": (n, c), "NGKS": tuple(x.shape)}
    rows = (*definition.inputs, *definition.params)
    return {
        row.name: 0.5 + torch.rand(shapes[_axes(row)], generator=generator, dtype=x.dtype)
        for row in rows
    }


def _axes(row):
    return "".join(str(axis.name) for axis in row.axes)


@pytest.mark.parametrize("name", FORMULAS)
def test_each_gradient_is_a_formula_that_the_oracle_agrees_with(name):
    formula = normc.zoo[name]
    x = torch.randn((2, 6, 3, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = {"x": x, **tensors(formula.definition, x)}
    leaves = {name: t.requires_grad_() for name, t in given.items()}
    results = normc.reference(formula)(**leaves, groups=3)
    results = results if isinstance(results, tuple) else (results,)
    cotangents = [torch.sin(3 * x.detach() + i) for i in range(len(results))]
    grads = torch.autograd.grad(results, list(leaves.values()), cotangents)
    names = ["d_y"] if len(results) == 1 else [f"d_y{i}" for i in range(len(results))]
    known = {k: t.detach() for k, t in given.items()} | dict(zip(names, cotangents, strict=True))
    found = derivatives(formula.definition)
    for (leaf, tensor), grad in zip(leaves.items(), grads, strict=True):
        gradient = found[f"d_{leaf}"]
        used = {r.name for r in (*gradient.inputs, *gradient.params)} | {"x"}
        value = reference(gradient)(**{k: t for k, t in known.items() if k in used}, groups=3)
        want = grad.reshape(BROADCAST[tensor.dim()]).expand_as(value)
        torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMULAS)
def test_each_gradient_parses_back(name):
    for gradient in derivatives(normc.zoo[name].definition).values():
        assert parse_definition(show_definition(gradient)) == gradient


def test_gradients_read_like_formulas():
    definition = normc.parse("x*v").definition
    assert show_derivatives(definition) == "d_x = v*d_y\nd_v = batch_sum(d_y*x)"
    assert latex_derivatives(definition).splitlines()[0].startswith("d_{x} = ")


# --- explain -------------------------------------------------------------------------------------


def test_explain_has_programs_plans_and_bytes_for_tensors_like_x():
    op = normc.compile("x/group_std(x)*gamma")
    text = op.explain(torch.empty(8, 64, 16, 16), groups=8)
    assert "x (8, 64, 16, 16) float32: N=8, G=8, K=8, S=256; backend " in text
    assert "forward: floor 2A, streaming 3A" in text
    assert "floor 1.0 MiB, streaming 1.5 MiB" in text
    assert "kernel k0 grid[N G]" in text


def test_explain_has_the_schedules_of_the_triton_backend(monkeypatch):
    monkeypatch.setattr(explain, "target_of", lambda *_: Target("triton", "float32"))
    text = normc.compile("x/group_std(x)*gamma").explain(torch.empty(8, 64, 16, 16), groups=8)
    assert "forward: floor 2A; resident, cluster 2A; streaming, split 3A (small: " in text
    assert "floor 1.0 MiB; resident, cluster 1.0 MiB; streaming, split 1.5 MiB" in text


def test_explain_follows_the_memory_format():
    op, x = normc.compile("x/channel_rms(x)*gamma"), torch.empty(2, 8, 3, 3)
    last = op.explain(x.to(memory_format=torch.channels_last))
    assert op.explain(x) != last
    assert op.explain(x.half()) != op.explain(x)


def test_explain_refuses_groups_that_do_not_divide():
    with pytest.raises(normc.ShapeError, match="groups=3"):
        normc.compile("x/group_std(x)").explain(torch.empty(2, 8, 3, 3), groups=3)
