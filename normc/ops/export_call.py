"""What a call of an exported function is about: checks of tensors, and views over (N, G, K, S).

The text is Python with ``$names`` that `normc.ops.export` fills in. It stays text because it stands
on its own in a file that knows nothing of normc; it means what `normc.language.geometry` and
`normc.backends.memory` mean.
"""

from __future__ import annotations

CALL = '''
class _Call(NamedTuple):
    """What a call is about: x seen as N samples, G groups of K channels each, and S positions."""

    sizes: tuple  # N, G, K, S
    channel: int  # the dimension of x that holds its channels
    spatial: tuple  # the sizes of the dimensions whose product is S
    eps: float
    dtype: torch.dtype
    device: torch.device
    stride: tuple = ()  # of a result over (N, G, K, S)
    path: str = "plain"  # or channels_first, channels_last: which functions compute

    def shape(self, axes):
        """The shape of a tensor over some of n, c and s: x's, without the dimensions it lacks."""
        sizes = [self.sizes[0]] if "n" in axes else []
        sizes += self.spatial if "s" in axes else []
        if "c" in axes:
            sizes.insert(self.place(axes), self.sizes[1] * self.sizes[2])
        return tuple(sizes)

    def place(self, axes):
        """Which dimension of a tensor over ``axes`` holds the channels."""
        return min(self.channel, 1) * ("n" in axes) + max(self.channel - 1, 0) * ("s" in axes)

    def view(self, tensor, axes):
        """A tensor over (N, G, K, S), of size 1 along the axes it lacks."""
        before, after = self.place(axes), int("n" in axes)
        if "c" in axes and before != after:
            tensor = tensor.movedim(before, after)
        has = ["n" in axes, "c" in axes, "c" in axes, "s" in axes]
        tensor = tensor.reshape([n if there else 1 for n, there in zip(self.sizes, has)])
        return tensor if axes == "ncs" else tensor.contiguous()

    def unview(self, tensor):
        """A tensor over (N, G, K, S) in x's shape."""
        n, g, k, _ = self.sizes
        return tensor.reshape(n, g * k, *self.spatial).movedim(1, self.channel)

    # for plain torch operations
    @property
    def real(self):
        """The type that everything is computed in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def wide(self, *tensors):
        """Tensors in that type."""
        return tuple(tensor.to(self.real) for tensor in tensors)

    def number(self, value):
        """A number as a tensor."""
        return torch.tensor(value, dtype=self.real, device=self.device)

    def store(self, value):
        """A result: in x's type, laid out in memory as x is."""
        return self.full().copy_(value)

    def over(self, axes, value):
        """A value spread over some of n, g, k and s."""
        return value.expand([n if a in axes else 1 for a, n in zip("ngks", self.sizes)])

    # for kernels
    def full(self):
        """Memory for a result, laid out as x is."""
        where = {"dtype": self.dtype, "device": self.device}
        return torch.empty_strided(self.sizes, self.stride, **where)

    def room(self, axes):
        """Memory for float32 numbers over some of n, g, k and s."""
        sizes = [n if a in axes else 1 for a, n in zip("ngks", self.sizes)]
        return torch.empty(sizes, dtype=torch.float32, device=self.device)

    def parts(self, size):
        """Memory for what every program adds to a sum."""
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def laid(self, tensor):
        """A tensor of x's shape, laid out as x is, so that kernels read it at full speed."""
        alike = self.path == "plain" or tensor.stride() == self.stride
        return tensor if alike else self.full().copy_(tensor)

    def index(self, *tensors):
        """The type of indices: 64 bits where 32 do not reach."""
        ends = [sum((n - 1) * step for n, step in zip(t.shape, t.stride())) for t in tensors]
        return tl.int64 if max([prod(self.sizes), *ends]) > 2**31 - 1 else tl.int32


def _run(x, tensors, groups, eps, channel_dim):
    """Check what is given, see it over (N, G, K, S), compute, and go back to x's shape."""
    call = _look(x, tensors, groups, eps, channel_dim)
    views = [call.view(t, _AXES[name]) for name, t in {"x": x, **tensors}.items()]
    if x.numel() == 0:  # no statistics, and all gradients are zero
        nothing = views[0] + sum(view.sum() * 0 for view in views)
        found = (nothing.to(x.dtype),) * $results
    else:
        like = torch.empty_like(views[0], device="meta")
        call = call._replace(stride=like.stride(), path=_path(views[0]))
        found = _Layer.apply(call, *views)
        found = found if isinstance(found, tuple) else (found,)
    results = tuple(call.unview(y) for y in found)
    return results if len(results) > 1 else results[0]


def _path(x):
    """Which functions compute: kernels for one of two orders of axes in memory, or plain torch."""
    if not (x.is_cuda or _INTERPRETED) or x.dtype not in _STORED:
        return "plain"
    _, c, s = _steps(x)
    last = x.shape[3] == 1 or (x.shape[1] * x.shape[2] > 1 and c < s)
    return "channels_last" if last else "channels_first"


def _steps(*tensors):
    """The strides of tensors over (N, G, K, S) along samples, channels and positions."""
    steps = []
    for tensor in tensors:
        n, g, k, s = tensor.stride()
        steps += [n, g if tensor.shape[2] == 1 else k, s]
    return steps


def _look(x, tensors, groups, eps, channel_dim):
    """Check everything that is given; an error names the tensor."""
    for name, tensor in {"x": x, **tensors}.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"`{name}` must be a tensor, not {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"`{name}` must be floating point, not {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"`{name}` is on {tensor.device} and x on {x.device}")
    shape, rank = tuple(x.shape), x.dim()
    if not 2 <= rank <= 5:
        raise ValueError(f"x must have 2 to 5 dimensions, not {rank}: shape {shape}")
    if not -rank <= channel_dim < rank:
        raise ValueError(f"channel_dim={channel_dim} is not a dimension of x: shape {shape}")
    channel = channel_dim % rank
    groups = _groups(groups, shape, channel)
    n, *spatial = (size for d, size in enumerate(shape) if d != channel)
    sizes = n, groups, shape[channel] // groups, prod(spatial)
    call = _Call(sizes, channel, tuple(spatial), float(eps), x.dtype, x.device)
    for name, tensor in tensors.items():
        want = call.shape(_AXES[name])
        if tuple(tensor.shape) != want:
            found = tuple(tensor.shape)
            raise ValueError(f"`{name}` must have shape {want} for x of shape {shape}, not {found}")
    return call


def _groups(groups, shape, channel):
    """The number of groups: "auto" is the largest divisor of the channel count up to 32."""
    channels = shape[channel]
    if groups == "auto":
        groups = max((d for d in range(1, 33) if channels % d == 0), default=1) if channels else 1
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f'groups must be a positive whole number or "auto", not {groups!r}')
    if channels % groups:
        raise ValueError(
            f"groups={groups} does not divide the {channels} channels of x "
            f"(dimension {channel} of shape {shape})"
        )
    return $groups
'''
