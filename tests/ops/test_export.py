"""op.export: the file stands alone, agrees with the oracle, checks itself, says what is wrong."""

import ast
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

import normc
from normc.analysis.agreement import LAYOUTS, Case, distance, draw, gradients, magnitude
from normc.ops.derivative import show_derivatives
from normc.ops.export_layer import layer
from normc.reference import reference
from tests.layers import every_layer

NAMES = (
    *("in_", "n", "c", "tl", "part", "torch", "program", "s0", "t0", "t0_", "x_n", "c_in"),
    *("larger", "call", "float", "l", "N"),
)
TEXTS = {
    "film": "input scale[n,c]; input shift[n,c]; x/instance_std(x)*scale + shift",
    "places": "input mask[n,s]; input place[s]; input w[n]; x*mask/channel_rms(x) + place*w",
    "pointwise": "x*sigmoid(v*x)",
    "scalar": "param alpha = 0.5; alpha*x/group_rms(x) + alpha",
    "names": f"input in_; input n; h = x*in_ + n; h/group_std(h)*({' + '.join(NAMES[2:])})",
    "extremes": "x*group_max(x) + channel_min(v*x) + batch_l1(x) + all_l2(x) + instance_sum(gamma)",
    "constants": "max(x, eps) + sqrt(eps) + where(1 < 2, x, 0) + where(x > 0, 1, 0.1)*x"
    " + group_sum(1)",
}
ZOO = ("evonorm_s0", "evonorm_b0", "layer_norm_tokens", "add_rms_norm", "dyt")
EVERY = (*ZOO, *TEXTS)
CHECKED = ("evonorm_b0", "add_rms_norm")
MORE = ("evonorm_s0", "film", "layer_norm_tokens", "pointwise", "scalar", "names")
CHECKED = (*CHECKED, *(pytest.param(name, marks=pytest.mark.thorough) for name in MORE))


def formula(name):
    return normc.parse(TEXTS[name]) if name in TEXTS else normc.zoo[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def file(folder):
    """The exported file of a formula; written once."""

    def write(name):
        path = folder / f"{name}.py"
        return path if path.exists() else normc.compile(formula(name)).export(path)

    return write


@pytest.fixture(scope="module")
def function(file):
    """The function of an exported file."""

    def load(name):
        path = file(name)
        spec = importlib.util.spec_from_file_location(f"exported_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        (public,) = module.__all__
        return getattr(module, public)

    return load


# --- the text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_nothing_of_normc_is_imported_and_no_name_is_given_twice(file, name):
    tree = ast.parse(file(name).read_text())
    found = {
        a.name.partition(".")[0]
        for n in ast.walk(tree)
        if isinstance(n, ast.Import)
        for a in n.names
    }
    found |= {n.module.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert found - sys.stdlib_module_names == {"torch", "triton"}
    assert "normc" not in {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    defined = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert len(set(defined)) == len(defined)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
            assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["evonorm_b0", "add_rms_norm", "names", "constants"])
def test_ruff_has_nothing_to_say(file, name):
    done = run([sys.executable, "-m", "ruff", "check", "--isolated", str(file(name))])
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", every_layer())
def test_every_layer_has_a_file(name, tmp_path):
    path = normc.compile(normc.zoo[name]).export(tmp_path / "layer.py")
    tree = ast.parse(path.read_text())
    assert name in [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]


def test_the_docstring_has_formula_derivative_and_use(file):
    text = ast.get_docstring(ast.parse(file("evonorm_s0").read_text()))
    assert normc.zoo["evonorm_s0"].text in text
    for line in show_derivatives(normc.zoo["evonorm_s0"].definition).splitlines():
        assert line in text
    assert 'y = evonorm_s0(x, v, gamma, beta, groups="auto", eps=1e-5, channel_dim=1)' in text


def test_what_stands_in_a_comment_cannot_leave_the_docstring(tmp_path):
    text = 'x*v  # """; import os; """ \\" \\'
    path = normc.compile(text).export(tmp_path / "layer.py")
    tree = ast.parse(path.read_text())
    assert "import os" in ast.get_docstring(tree)
    assert text not in path.read_text()


@pytest.mark.parametrize(
    "file, function",
    [("mine", "mine"), ("class", "class_"), ("max", "max_"), ("2d norm", "layer_2d_norm")]
    + [("_run", "layer_run"), ("larger", "larger_"), ("torch", "torch_")],
)
def test_a_formula_without_a_name_is_called_after_the_file(tmp_path, file, function):
    path = normc.compile("x*v").export(tmp_path / f"{file}.py")
    tree = ast.parse(path.read_text())
    assert [n.name for n in tree.body if isinstance(n, ast.FunctionDef)][0] == function


def test_a_file_is_overwritten_and_its_path_comes_back(tmp_path):
    path = tmp_path / "layer.py"
    path.write_text("old")
    assert normc.compile("x*v").export(str(path)) == path
    assert path.read_text().startswith('"""layer: ')


@pytest.mark.parametrize("name", ["y", "d_x", "d_y"])
def test_a_parameter_called_like_a_result_or_gradient_is_refused(name, tmp_path):
    with pytest.raises(normc.NormcError, match=f"`{name}` is also what a result"):
        normc.compile(f"x*{name}").export(tmp_path / "layer.py")


def test_the_first_choice_of_tiles_is_there_for_both_orders():
    orders = [(order, job.part) for order, job in layer(normc.zoo["dyt"], "dyt").jobs()]
    parts = ("forward", "backward")
    assert orders == [(o, p) for o in ("channels_first", "channels_last") for p in parts]


# --- the file on its own --------------------------------------------------------------------------


def run(command, **env):
    known = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=known | env, capture_output=True, text=True, timeout=280)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def alone(folder):
    """``python file.py`` where importing normc fails."""
    (folder / "without" / "normc").mkdir(parents=True)
    (folder / "without" / "normc" / "__init__.py").write_text("raise ImportError('no normc here')")

    def check(path, **env):
        env = {"PYTHONPATH": str(folder / "without"), "OMP_NUM_THREADS": "1"} | env
        return run([sys.executable, str(path)], **env)

    return check


@pytest.mark.cpu
def test_normc_cannot_be_imported_there(alone, tmp_path):
    (tmp_path / "try.py").write_text("try:\n    import normc\nexcept ImportError:\n    print('no')")
    assert alone(tmp_path / "try.py").stdout == "no\n"


@pytest.mark.cpu
@pytest.mark.parametrize("name", CHECKED)
def test_the_file_checks_itself(alone, file, name):
    done = alone(file(name))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ok     plain torch") == 13
    line = done.stdout.splitlines()[0]
    several = ["y0", "y1"] if name == "add_rms_norm" else ["y"]
    given = [*formula(name).inputs, *formula(name).params]
    wanted = [*several, "d_x", *(f"d_{row.name}" for row in given)]
    assert sorted(re.findall(r"(\w+) \d\S*e", line)) == sorted(wanted)


@pytest.mark.interpret
@pytest.mark.parametrize("name", CHECKED)
def test_the_file_checks_its_kernels(alone, file, name):
    done = alone(file(name), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert sum("kernels" in line for line in lines) == 14
    assert sum("in loops" in line for line in lines) == 6


@pytest.mark.cpu
def test_a_wrong_derivative_does_not_pass(alone, file, tmp_path):
    right = "    d_v = call.over("
    before, _, after = file("pointwise").read_text().partition(right)
    wrong = tmp_path / "wrong.py"
    wrong.write_text(f"{before}{right}{after.replace(', ', ', 1.001*', 1)}")
    done = alone(wrong)
    assert done.returncode == 1
    assert "FAILED plain torch" in done.stdout


# --- values and gradients -------------------------------------------------------------------------

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


def agrees(function, name, case):
    """Compare with the oracle: every result and every gradient."""
    parsed = formula(name)
    given, cotangents = draw(parsed.definition, case)
    order = ["x", *(row.name for row in (*parsed.inputs, *parsed.params))]
    given = {key: given[key] for key in order}
    how = {"groups": case.groups, "eps": 1e-2, "channel_dim": case.layout.channel_dim}
    oracle = reference(parsed)
    wide = {key: t.double() for key, t in given.items()}
    want = gradients(lambda **t: oracle(**t, **how), wide, [d.double() for d in cotangents])
    found = gradients(lambda **t: function(*t.values(), **how), given, cotangents)
    for key, tensor in want.items():
        error = distance(found[key], tensor, max(magnitude(tensor), 1e-3))
        assert error < TOLERANCE[case.dtype], (key, case.show(), error)
        assert found[key].dtype == getattr(torch, case.dtype)


SHAPES = {2: (5, 6), 3: (2, 6, 3), 4: (2, 6, 3, 2), 5: (1, 6, 2, 1, 3)}


def cases(dtype):
    for layout in LAYOUTS:
        shape = (2, 3, 6) if layout.channel_dim == -1 else SHAPES[layout.rank]
        yield Case(layout, shape, 3, dtype, 7)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", EVERY)
def test_plain_operations_agree_with_the_oracle(function, name, dtype):
    for case in cases(dtype):
        agrees(function(name), name, case)


@pytest.mark.cpu
@pytest.mark.parametrize("channel_dim", [0, 2, 3])
def test_channels_may_be_any_dimension(function, channel_dim):
    shape = [2, 3, 4, 5]
    shape[channel_dim] = 6
    x, place = torch.randn(shape, dtype=torch.float64), [d for d in range(4) if d != channel_dim]
    n, s = shape[place[0]], [shape[d] for d in place[1:]]
    given = {"mask": torch.randn(n, *s), "place": torch.randn(s), "w": torch.randn(n)}
    given = {key: t.double() for key, t in given.items()}
    y = function("places")(x, **given, channel_dim=channel_dim)
    torch.testing.assert_close(y, reference(formula("places"))(x, channel_dim=channel_dim, **given))


def evonorm(dtype=torch.float64, shape=(2, 8, 3, 3)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    rest = [torch.rand(shape[1], generator=generator, dtype=dtype) + 0.5 for _ in range(3)]
    return dict(zip(("x", "v", "gamma", "beta"), (x, *rest), strict=True))


@pytest.mark.cpu
@pytest.mark.parametrize("wrt", ["x", "v", "gamma", "beta", "x v", "gamma beta", ""])
def test_gradients_are_there_for_what_wants_one(function, wrt):
    given = evonorm()
    wanted = [given[name].requires_grad_() for name in wrt.split()]
    y = function("evonorm_s0")(**given, groups=4)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.square().sum().backward()
        want = reference(formula("evonorm_s0"))(**given, groups=4).square().sum()
        for leaf, grad in zip(wanted, torch.autograd.grad(want, wanted), strict=True):
            torch.testing.assert_close(leaf.grad, grad)
    assert [key for key, t in given.items() if t.grad is not None] == wrt.split()


@pytest.mark.cpu
def test_one_of_two_results_may_go_unused(function):
    x, residual = (torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in "xr")
    gamma = torch.rand(8, dtype=torch.float64, requires_grad=True)
    given = {"x": x, "residual": residual, "gamma": gamma}
    for i in range(2):
        y = function("add_rms_norm")(**given, channel_dim=-1)[i]
        want = reference(formula("add_rms_norm"))(**given, channel_dim=-1)[i]
        found = torch.autograd.grad(y.sin().sum(), [x, residual])
        torch.testing.assert_close(found, torch.autograd.grad(want.sin().sum(), [x, residual]))


@pytest.mark.cpu
def test_a_gradient_without_memory_of_its_own(function):
    given = {key: t.requires_grad_() for key, t in evonorm().items()}
    found = torch.autograd.grad(function("evonorm_s0")(**given).sum(), given["x"])
    want = torch.autograd.grad(reference(formula("evonorm_s0"))(**given).sum(), given["x"])
    torch.testing.assert_close(found, want)


@pytest.mark.cpu
def test_tensors_may_differ_in_type_and_gradients_have_that_of_their_tensor(function):
    given = evonorm(torch.bfloat16)
    given |= {"gamma": given["gamma"].float(), "beta": given["beta"].double()}
    leaves = {key: t.requires_grad_() for key, t in given.items()}
    y = function("evonorm_s0")(**leaves, groups=2)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(t.grad.dtype == t.dtype for t in leaves.values())
    want = reference(formula("evonorm_s0"))(**{k: t.double() for k, t in given.items()}, groups=2)
    torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.cpu
def test_tensors_of_the_shape_of_x_are_not_copied(file):
    assert (
        '_AXES = {"x": "ncs", "residual": "ncs", "gamma": "c"}' in file("add_rms_norm").read_text()
    )


@pytest.mark.cpu
def test_results_and_gradients_keep_the_memory_format(function):
    given = evonorm()
    given["x"] = given["x"].contiguous(memory_format=torch.channels_last).requires_grad_()
    y = function("evonorm_s0")(**given)
    y.square().sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert given["x"].grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.cpu
@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 8, 0), (2, 0, 3)])
def test_without_elements_results_are_empty_and_gradients_zero(function, shape):
    given = {key: t.requires_grad_() for key, t in evonorm(shape=shape).items()}
    y = function("evonorm_s0")(**given)
    y.sum().backward()
    assert y.shape == shape
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in given.values())


@pytest.mark.cpu
def test_a_second_derivative_is_an_error(function):
    given = {key: t.requires_grad_() for key, t in evonorm().items()}
    y = function("evonorm_s0")(**given).square().sum()
    (grad,) = torch.autograd.grad(y, given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.cpu
@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"gamma": torch.ones(7)}, ValueError, r"`gamma` must have shape \(8,\) for x of shape"),
        ({"v": 1.0}, TypeError, "`v` must be a tensor, not float"),
        ({"x": torch.ones(2, 8, 3, dtype=torch.int64)}, TypeError, "`x` must be floating point"),
        ({"beta": torch.ones(8, device="meta")}, ValueError, "`beta` is on meta and x on cpu"),
        ({"x": torch.ones(8)}, ValueError, "x must have 2 to 5 dimensions, not 1"),
        ({"groups": 3}, ValueError, "groups=3 does not divide the 8 channels of x"),
        ({"groups": 0}, ValueError, "groups must be a positive whole number"),
        ({"groups": "all"}, ValueError, 'groups must be a positive whole number or "auto"'),
        ({"channel_dim": 4}, ValueError, "channel_dim=4 is not a dimension of x"),
    ],
)
def test_errors_name_the_tensor(function, change, error, says):
    with pytest.raises(error, match=says):
        function("evonorm_s0")(**(evonorm(torch.float32) | change))


@pytest.mark.cpu
def test_an_input_of_another_shape_is_named(function):
    x = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"`scale` must have shape \(2, 3\) .* not \(3,\)"):
        function("film")(x, torch.ones(3), torch.ones(2, 3))


# --- kernels --------------------------------------------------------------------------------------


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6
def in_turns():
    """Every formula in every dtype; in `make test` one dtype each, another for the next."""
    dtypes = "float32", "bfloat16", "float16"
    for i, name in enumerate(EVERY):
        for j, dtype in enumerate(dtypes):
            marks = () if (i + j) % len(dtypes) == 0 else (pytest.mark.thorough,)
            yield pytest.param(name, dtype, marks=marks)


class TestKernels:
    """The same in Triton's interpreter, where float32 and halves go through the kernels."""

    @pytest.mark.parametrize(("name", "dtype"), list(in_turns()))
    def test_they_agree_with_the_oracle(self, function, name, dtype):
        for case in list(cases(dtype))[:: 1 if dtype == "float32" else 3]:
            agrees(function(name), name, case)

    def test_a_gradient_without_memory_of_its_own(self, function):
        given = {key: t.requires_grad_() for key, t in evonorm(torch.float32).items()}
        (found,) = torch.autograd.grad(function("evonorm_s0")(**given).sum(), given["x"])
        (want,) = torch.autograd.grad(reference(formula("evonorm_s0"))(**given).sum(), given["x"])
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)

    def test_strides_that_cannot_be_walked_are_copied(self, function):
        given = evonorm(torch.float32, (2, 8, 3, 5))
        x = given["x"].transpose(2, 3)  # its positions are no single stride apart
        y = function("evonorm_s0")(**(given | {"x": x}))
        want = reference(formula("evonorm_s0"))(**(given | {"x": x}))
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
