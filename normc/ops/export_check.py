"""The self-check of an exported file: everything it computes, against the formula in float64.

The text is Python with ``$names`` that `normc.ops.export` fills in. It stays text because it stands
on its own in a file that knows nothing of normc; `normc.analysis.agreement` judges alike.
"""

from __future__ import annotations

CHECK = '''
_CASES = (  # shape of x, channel_dim, groups, layout
    ((3, 12, 5, 4), 1, 3, "contiguous"),
    ((3, 12, 5, 4), 1, 3, "channels last"),
    ((2, 8, 4, 6), 1, 2, "sliced"),
    ((2, 7, 12), -1, 4, "tokens"),
    ((5, 12), 1, 3, "rows"),
    ((2, 6, 3, 2, 4), 1, 2, "volumes"),
)
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
_EPS = 0.1  # large, so that no term is divided by almost nothing


def _straightforward(x, tensors, groups, eps, channel_dim):
    """`_formula` in place of `_run`."""
    call = _look(x, tensors, groups, eps, channel_dim)
    views = [call.view(t, _AXES[name]) for name, t in {"x": x, **tensors}.items()]
    return tuple(call.unview(y.expand(call.sizes)) for y in _formula(call, *views))


def _laid_out(tensor, layout):
    """The same numbers in other memory."""
    if layout == "channels last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":  # every second column of a larger tensor, without its first row
        *outer, height, width = tensor.shape
        return tensor.new_zeros((*outer, height + 1, 2 * width))[..., 1:, ::2].copy_(tensor)
    return tensor


def _draw(case, dtype, device):
    """Tensors by name, and what arrives at each result."""
    shape, channel_dim, groups, layout = case
    generator = torch.Generator().manual_seed(len(shape))
    call = _look(torch.empty(shape), {}, groups, _EPS, channel_dim)

    def normal(axes, mean, spread):
        numbers = torch.randn(call.shape(axes), generator=generator, dtype=torch.float64)
        numbers = (mean + spread * numbers).to(device, dtype)
        return _laid_out(numbers, layout) if axes == "ncs" else numbers

    given = {n: normal(a, *((0.3, 1) if a == "ncs" else (1, 0.4))) for n, a in _AXES.items()}
    return given, [normal("ncs", 0, 1) for _ in range($results)]


def _everything(function, given, cotangents, case):
    """The results of a function and the gradients of all it is given, by name, in float64."""
    _, channel_dim, groups, _ = case
    x, *rest = leaves = [tensor.detach().requires_grad_() for tensor in given.values()]
    tensors = dict(zip(list(given)[1:], rest))
    found = function(x, tensors, groups, _EPS, channel_dim)
    found = found if isinstance(found, tuple) else (found,)
    pairs = [(y, d) for y, d in zip(found, cotangents) if y.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in pairs],
        leaves,
        [d.to(y.dtype) for y, d in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    names = [$names, *(f"d_{name}" for name in given)]
    return {name: t.detach().double().cpu() for name, t in zip(names, (*found, *grads))}


def _distance(found, want):
    """The largest difference; infinite where NaN or infinities differ."""
    finite = want.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return float("inf")
    if not torch.equal(found[~finite].nan_to_num(), want[~finite].nan_to_num()):
        return float("inf")
    return _largest(found[finite] - want[finite])


def _largest(tensor):
    """The largest absolute value of those that are finite."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _compare(case, dtype, device, note):
    """One check, printed as one line: whether results and gradients are those of the formula.

    An error is relative to the largest number of its tensor. It may exceed the tolerance where the
    formula itself does as much with numbers that are one unit in the last place off.
    """
    given, cotangents = _draw(case, dtype, device)
    exact = {name: tensor.cpu().double() for name, tensor in given.items()}
    unit = torch.finfo(dtype).eps
    off = {name: t * (1 + unit * torch.sign(torch.sin(1e5 * t))) for name, t in exact.items()}
    arriving = [d.cpu().double() for d in cotangents]
    want = _everything(_straightforward, exact, arriving, case)
    noise = _everything(_straightforward, off, arriving, case)
    found = _everything(_run, given, cotangents, case)
    rounding = unit * max(map(_largest, want.values()))
    errors = {}
    for name, tensor in want.items():
        scale = _largest(tensor) if _largest(tensor) * unit > 1e-9 * rounding else 1.0
        allowed = 8 * max(_distance(noise[name], tensor), rounding) / scale
        error = _distance(found[name], tensor) / scale
        errors[name] = error, error <= max(_TOLERANCE[dtype], allowed)
    fine = all(good for _, good in errors.values())
    x = _look(given["x"], {}, case[2], _EPS, case[1]).view(given["x"], "ncs")
    how = {"plain": "plain torch"}.get(_path(x), f"{_path(x)} kernels{note}")
    how = f"{how}, {str(dtype)[6:]}, {case[3]} {case[0]}"
    shown = ", ".join(f"{name} {error:.0e}" for name, (error, _) in errors.items())
    print(f"{'ok    ' if fine else 'FAILED'} {how}: {shown}")
    return fine


def _limits(on_chip, streamed):
    """Set the sizes of tiles: small ones let small tensors go through every loop."""
    global ON_CHIP, STREAMED
    ON_CHIP, STREAMED = on_chip, streamed
    _tiles.cache_clear()


def _self_check():
    """Compare everything with `_formula` in float64; the number of checks that failed."""
    if _INTERPRETED:  # numpy runs the kernels, and tells of what happens in lanes that are masked
        warnings.simplefilter("ignore", RuntimeWarning)
    cpu = torch.device("cpu")
    failed = sum(not _compare(case, torch.float64, cpu, "") for case in _CASES)
    if not _INTERPRETED:
        failed += sum(not _compare(case, torch.float32, cpu, "") for case in _CASES)
        failed += not _compare(_CASES[0], torch.bfloat16, cpu, "")
    if torch.cuda.is_available() or _INTERPRETED:
        device = torch.device("cuda") if torch.cuda.is_available() else cpu
        failed += sum(not _compare(case, torch.float32, device, "") for case in _CASES)
        failed += not _compare(_CASES[0], torch.bfloat16, device, "")
        failed += not _compare(_CASES[3], torch.float16, device, "")
        limits = ON_CHIP, STREAMED
        _limits(0, 64)
        failed += sum(not _compare(case, torch.float32, device, " in loops") for case in _CASES)
        _limits(*limits)
    else:
        print("the kernels were not run: that takes a GPU, or TRITON_INTERPRET=1, which is slow")
    return failed


if __name__ == "__main__":
    sys.exit(1 if _self_check() else 0)
'''
