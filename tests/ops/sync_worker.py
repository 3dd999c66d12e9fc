"""One of several processes over which a batch or a model is spread, and what they compute.

Tests import `CASES`, `measure` and `findings`; what `findings` starts is this file as a script:
``sync_worker.py JOB RANK WORLD FOLDER``. Processes meet at a file in the folder, so no port can
clash, run one job from beginning to end, so starting is paid once, and leave a file each. Longer
than most files, for a script finds no other.
"""

import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import normc

PATIENCE = timedelta(seconds=60)  # with a process that does not answer
LIMIT = 200  # seconds for a job
STEPS = 3  # of training, in each case

FORMULAS = {  # those without a name in the zoo
    "nested": "x - batch_mean(x*gamma)/batch_std(tanh(x)) + batch_max(v*x)*batch_min(x)",
    "of a statistic": "x - batch_mean(x*batch_rms(x))",
    "three deep": "x/batch_rms(x - batch_mean(x*batch_max(x/v))) + beta",
    "of all": "x/all_rms(x)*gamma",
    "of all, by sample": "x*gamma/all_max(layer_rms(v*x))",
    "of groups": "x/(1 + batch_group_absmax(x))",
    "sum": "x/(1 + batch_sum(x*x))",
    "count": "x*x*gamma/batch_sum(1) + x*batch_sum(beta)",
    "two results": "input z; h = x + z; (h - batch_mean(h))/batch_std(h)*gamma + beta, h*v",
    "of samples": "(x - mean[n](x))/std[n](x)*gamma",
    "maximum of samples": "x/(2 + max[n](abs(x)))",
    "maximum": "relu(x)*batch_max(relu(x))",
    "ends": "x*batch_max(x) + v*batch_min(x)",
    "ends of all": "x*batch_max(x) + v*all_min(x)",
}


def formula(name):
    return normc.zoo[name] if name in normc.zoo else normc.parse(FORMULAS.get(name, name))


def draw(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


KINDS = {  # what becomes of normal numbers
    "normal": lambda t: t,
    "ties": lambda t: t.round().clamp(-1, 1),  # within processes, and across them
    "negative": lambda t: -t.abs() - 0.1,
    "constant": lambda t: torch.full_like(t, 0.7),
    "nan": lambda t: torch.cat([t[:-1], t[-1:].clone().index_fill_(1, torch.tensor(2), torch.nan)]),
    "far": lambda t: t + 300,  # the mean of squares is no way to a variance
}


@dataclass(frozen=True)
class Case:
    """A layer of four channels in two groups, and how many samples each process has of its batch.

    Two shares are those of the processes 1 and 2, which have a group of their own, so that a rank
    in the group is not the rank among all; three are those of all processes.
    """

    formula: str
    shares: tuple = (5, 2)
    backend: str = "torch"
    stored: torch.dtype = torch.float64  # what x is rounded to
    dtype: torch.dtype = torch.float64  # of x
    kind: str = "normal"
    how: dict = field(default_factory=dict)  # what else the layer is made with

    @property
    def tracked(self):
        return self.how.get("track_running_stats", True)

    @property
    def penalized(self):
        """Second derivatives of rounded numbers say little."""
        return self.stored == torch.float64

    def layer(self, **how):
        """A layer whose parameters have left their start; those of a narrow x are float32."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        how = {"groups": 2, "backend": self.backend, "dtype": dtype, **self.how, **how}
        layer = normc.Layer(formula(self.formula), 4, **how)
        with torch.no_grad():
            for i, p in enumerate(layer.parameters()):
                p.copy_(1 + 0.3 * draw(p.shape, 100 + i))
        return layer

    def part(self, rank, seed, kind="normal"):
        """What a process has of a tensor over the whole batch; all of it for None."""
        shape = (4, 3, 2) if self.how.get("channel_dim", 1) == 1 else (3, 2, 4)
        whole = KINDS[kind](draw((sum(self.shares), *shape), seed))
        whole = whole.to(self.stored).to(self.dtype)
        return (whole if rank is None else whole.split(self.shares)[rank]).clone()

    def inputs(self, rank, names, turn):
        """What goes into the layer at one step."""
        kinds = {"x": self.kind}
        return {
            name: self.part(rank, 10 * turn + i, kinds.get(name, "normal")).requires_grad_()
            for i, name in enumerate(names)
        }


UNTRACKED = {"track_running_stats": False}
NARROW = (torch.float32, torch.bfloat16)
TAKEN = ("evonorm_b1", "batch_instance_norm", "switchable_norm", "group_norm")
IN_C = ("batch_norm", "evonorm_b0", "bn_relu", "nested", "two results")
EMPTY = [(7, 0), (0, 7), (3, 0, 4)]

CASES = {
    **{n: Case(n) for n in (*TAKEN, *IN_C, *FORMULAS) if "of samples" not in n},
    **{f"{n} in c": Case(n, backend="c") for n in IN_C},
    **{n: Case(n, how=UNTRACKED) for n in ("of samples", "maximum of samples")},
    "untracked": Case("batch_norm", how=UNTRACKED),
    "count": Case("count", how=UNTRACKED),
    "one that is not a number": Case("nested", kind="nan"),
    "channels last": Case("nested", how={"channel_dim": -1}),
    "momentum": Case("evonorm_b0", how={"momentum": 0.3}),
    "cumulative": Case("batch_norm", how={"momentum": None}),
    "cumulative among three": Case("nested", (4, 1, 2), how={"momentum": None}),
    "three of all": Case("of all", (4, 1, 2)),
    "far": Case("batch_norm", kind="far"),
    **{f"maximum of {k}": Case("maximum", kind=k) for k in ("ties", "negative", "constant")},
    **{f"ends of {k}": Case("ends", kind=k) for k in ("ties", "constant")},
    "ends of ties in c": Case("ends", kind="ties", backend="c"),
    "ends of ties among three": Case("ends of all", (2, 3, 2), kind="ties"),
    "ends of ties beside nothing": Case("ends", (0, 7), kind="ties"),
    **{f"{n}, {s}": Case(n, s) for n in ("batch_norm", "evonorm_b0", "nested") for s in EMPTY},
    **{f"{n} beside nothing": Case(n, (0, 7)) for n in ("of a statistic", "two results")},
    "count beside nothing": Case("count", (0, 7), how=UNTRACKED),
    "nested beside nothing in c": Case("nested", (7, 0), backend="c"),
    "of samples beside nothing": Case("of samples", (7, 0), how=UNTRACKED),
    "one sample": Case("batch_norm", (1, 0)),
    "nothing anywhere": Case("batch_norm", (0, 0)),
    "no maximum anywhere": Case("maximum", (0, 0)),
    **{f"{n}, {str(d)[6:]}": Case(n, stored=d, dtype=d)
       for n in ("batch_norm", "evonorm_b0", "nested", "two results") for d in NARROW},
    "far, float32": Case("batch_norm", kind="far", stored=torch.float32, dtype=torch.float32),
    "bfloat16 in c": Case("evonorm_b0", stored=torch.bfloat16, dtype=torch.bfloat16, backend="c"),
}  # fmt: skip


# --- what is compared -------------------------------------------------------------------------


def measure(layer, case, rank=None):
    """Steps of training, a gradient penalty, and evaluation: all tensors, of three kinds.

    Those over samples, those that are summed over processes, and those that are the same for all of
    them. Of the whole batch where no rank is given.
    """
    found = {"samples": [], "summed": [], "same": []}
    names = ["x", *(i.name for i in layer.formula.inputs)] if hasattr(layer, "formula") else ["x"]
    for turn in range(STEPS):
        step(layer, case, rank, case.inputs(rank, names, turn), found)
    if case.penalized:
        step(layer, case, rank, case.inputs(rank, names, STEPS), found, penalty)
    found["same"] += [b.clone() for b in layer.buffers()]
    layer.eval()
    if case.tracked:  # else each process evaluates by the statistics of its own batch
        step(layer, case, rank, case.inputs(rank, names, STEPS), found)
    return found


def step(layer, case, rank, given, found, second=None):
    """The loss is a sum with weights: that of squares hardly depends on a normalized x."""
    layer.zero_grad()
    results = layer(given["x"], **{name: t for name, t in given.items() if name != "x"})
    results = results if isinstance(results, tuple) else (results,)
    weighted = [y.double() * case.part(rank, 50 + i).double() for i, y in enumerate(results)]
    loss = sum(y.sum() for y in weighted)
    (second(loss, case, rank, given) if second else loss).backward()
    found["samples"] += [*(y.detach() for y in results), *map(gradient, given.values())]
    found["summed"] += [loss.detach(), *map(gradient, layer.parameters())]


def penalty(loss, case, rank, given):
    """Of the gradients by input, weighted squares."""
    grads = torch.autograd.grad(loss, list(given.values()), create_graph=True)
    return sum((g * g * case.part(rank, 60)).sum() for g in grads)


def gradient(tensor):
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone()


# --- what belongs to processes ----------------------------------------------------------------

COUNTED = ["group_norm", "batch_norm", "untracked", "nested", "of a statistic", "three deep"]
RAGGED = [(2, 4, 3, 3), (1, 4, 5, 2)]  # processes may have images of different sizes
OPEN = ["batch_norm", "nested"]


def exchanges(name, group):
    """How often the processes of a group exchange numbers: forward, backward, and evaluating."""
    layer = CASES[name].layer(sync=True, process_group=group)
    seen, real = [], dist.all_reduce
    dist.all_reduce = lambda *args, **how: seen.append(args) or real(*args, **how)
    try:
        x = draw((2, 4, 3), 0).requires_grad_()
        counts = [0]
        y = layer(x)
        counts.append(len(seen))
        y.sum().backward()
        counts.append(len(seen))
        layer.eval()(x).sum().backward()
        counts.append(len(seen))
    finally:
        dist.all_reduce = real
    return [after - before for before, after in zip(counts, counts[1:], strict=False)]


def as_rows(t):
    return t.movedim(1, -1).reshape(-1, 4)


def ragged(name, rank, group):
    layer = Case(name).layer(sync=True, process_group=group)
    x = draw(RAGGED[rank], rank).requires_grad_()
    y = layer(x)
    (y * draw(RAGGED[rank], 10 + rank)).sum().backward()
    return {
        "samples": [as_rows(y.detach()), as_rows(x.grad)],
        "summed": [gradient(p) for p in layer.parameters()],
        "same": list(layer.buffers()),
    }


def first(name, rank, group):
    """Of an input that wants no gradient, as that of a network's first layer."""
    case = Case(name)
    layer, x = case.layer(sync=True, process_group=group), case.part(rank, 0)
    with torch.no_grad():
        quiet = layer(x)
    y = layer(x)
    (y * case.part(rank, 50)).sum().backward()
    return {"samples": [y.detach(), quiet], "summed": [gradient(p) for p in layer.parameters()]}


def skewed(name, rank, group):
    """The gradient of a bfloat16 input where the cotangents have a mean."""
    layer = Case(name).layer(sync=group is not None, process_group=group, dtype=torch.float32)
    case = Case(name, stored=torch.bfloat16, dtype=torch.bfloat16)
    x = case.part(rank, 0).requires_grad_()
    layer(x).backward(case.part(rank, 1) + 30)
    return x.grad


def sync(rank):
    """Everything by name."""
    pair = dist.new_group([1, 2], timeout=PATIENCE)
    found = {}
    for name, case in CASES.items():
        group = pair if len(case.shares) == 2 else None
        if group is None or rank > 0:
            layer = case.layer(sync=True, process_group=group)
            attempt(found, name, partial(measure, layer, case, dist.get_rank(group)))
    if rank == 0:
        return found
    for name in COUNTED:
        attempt(found, f"exchanges of {name}", partial(exchanges, name, pair))
    for name in OPEN:
        attempt(found, f"ragged {name}", partial(ragged, name, rank - 1, pair))
        attempt(found, f"first {name}", partial(first, name, rank - 1, pair))
        attempt(found, f"skewed {name}", partial(skewed, name, rank - 1, pair))
    return found


# --- a network in training --------------------------------------------------------------------

NETS = {  # the layers of a network, and how they take statistics
    "evonorm_s0": {"groups": 4},
    "evonorm_b0": {"sync": True},
    "batch_norm": {"sync": True, "momentum": None},
}
FULL = StateDictOptions(full_state_dict=True)


def network(name, seed=0, **how):
    torch.manual_seed(seed)
    how, f = {**NETS[name], "dtype": torch.float64, **how}, normc.zoo[name]
    layers = normc.Layer(f, 4, **how), normc.Layer(f, 8, **how)
    convs = nn.Conv2d(3, 4, 3, dtype=torch.float64), nn.Conv2d(4, 8, 3, dtype=torch.float64)
    head = nn.Linear(32, 3, dtype=torch.float64)
    return nn.Sequential(convs[0], layers[0], convs[1], layers[1], nn.Flatten(), head)


def images(rank=None):
    """Six images and their labels, or a process' three."""
    x, y = draw((6, 3, 6, 6), 0), torch.tensor([0, 1, 2, 2, 1, 0])
    return (x, y) if rank is None else (x.chunk(2)[rank], y.chunk(2)[rank])


def learn(model, x, y):
    """The losses of three steps."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return losses


def copies(name, rank):
    """DistributedDataParallel."""
    model = network(name)
    losses = learn(nn.parallel.DistributedDataParallel(model), *images(rank))
    return losses, model.state_dict()


def shard(model):
    for layer in model:
        if isinstance(layer, normc.Layer):
            fully_shard(layer)
    return fully_shard(model)


def shards(name, rank):
    """FSDP2: losses, the state of all, how much is kept here, what another model makes of it."""
    model, other = shard(network(name)), shard(network(name, seed=1))
    losses = learn(model, *images(rank))
    state = get_model_state_dict(model, options=FULL)
    kept = {n: p.to_local().numel() for n, p in model.named_parameters()}
    set_model_state_dict(other, {n: t.clone() for n, t in state.items()}, options=FULL)
    results = [m.eval()(images(rank)[0]).detach() for m in (model, other)]
    return losses, state, kept, results


def narrow_shards(name, rank):
    """FSDP2 with parameters and activations in bfloat16: results, gradients, dtypes of buffers."""
    model = network(name, dtype=torch.float32).float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    y = fully_shard(model, mp_policy=policy)(images(rank)[0].float())
    y.float().square().sum().backward()
    return y.detach(), [p.grad.full_tensor() for p in model.parameters()], list(model.buffers())


def training(rank):
    found = {}
    for name in NETS:
        attempt(found, f"copies {name}", partial(copies, name, rank))
        attempt(found, f"shards {name}", partial(shards, name, rank))
        attempt(found, f"narrow shards {name}", partial(narrow_shards, name, rank))
    return found


# --- processes --------------------------------------------------------------------------------

JOBS = {"sync": sync, "training": training}


def attempt(found, name, run):
    """What went wrong is a finding too, so that the others do not wait."""
    try:
        found[name] = run()
    except Exception:
        found[name] = traceback.format_exc()


@cache
def findings(job, world):
    """What so many processes found; they run once for all workers of a run of tests."""
    where = Path(os.environ["NORMC_CACHE_DIR"]) / f"{job}_{world}"
    with FileLock(f"{where}.lock"):
        if not where.exists():
            folder = tempfile.mkdtemp(dir=where.parent)
            Path(folder, "failure").write_text(launch(job, world, folder), "utf-8")
            os.rename(folder, where)
    failure = (where / "failure").read_text("utf-8")
    assert not failure, failure
    return [torch.load(where / f"{rank}.pt") for rank in range(world)]


def launch(job, world, folder):
    """Run a job in so many processes; what they said if one failed or was late."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", __file__, job]
    started = [
        subprocess.Popen([*command, str(rank), str(world), folder], env=env,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(world)
    ]  # fmt: skip
    last = time.monotonic() + LIMIT
    try:
        said = [p.communicate(timeout=max(1, last - time.monotonic()))[0] for p in started]
    except subprocess.TimeoutExpired:
        return f"{job} took more than {LIMIT} seconds"
    finally:
        for process in started:
            process.kill()
    return "\n".join(said) if any(process.returncode for process in started) else ""


def main(job, rank, world, folder):
    torch.set_num_threads(1)
    meet = f"file://{Path(folder) / 'store'}"
    dist.init_process_group("gloo", meet, PATIENCE, world_size=int(world), rank=int(rank))
    torch.save(JOBS[job](int(rank)), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
