"""Launch the kernels of a folder as its manifest says, in Triton's interpreter: ``launch.py DIR``.

Nothing but the manifest says what is launched, with which arguments and on which tensors. The
results are compared with the oracle in float64, in value and in every gradient.
"""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path

import torch
import triton.language as tl

import normc


def launch(where, job, known):
    """Run a job on its inputs by name; all its tensors by name."""
    tensors = {t["name"]: allocate(t, known) for t in job["tensors"]}
    for kernel in job["kernels"]:
        function = getattr(load(where / kernel["source"]["file"]), kernel["name"])
        given = {
            a["name"]: argument(a, tensors)
            for a in kernel["arguments"]
            if a["name"] in function.arg_names
        }
        function[tuple(kernel["grid"])](**given)
    return tensors


@cache
def load(path):
    """A file of kernels as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def allocate(about, known):
    """A tensor as the manifest describes it, full of NaN unless it is an input."""
    dtype = getattr(torch, about["dtype"])
    made = torch.empty_strided(about["shape"], about["strides"], dtype=dtype)
    if about["role"] == "input":
        return made.copy_(known[about["name"]])
    return made.fill_(0 if about["zeros"] else torch.nan)


def argument(about, tensors):
    if about["kind"] == "pointer":
        return tensors[about["tensor"]]
    value = about["value"]
    return getattr(tl, value) if isinstance(value, str) else value


def main(where):
    found = json.loads((where / "manifest.json").read_text("utf-8"))
    forward, backward = found["jobs"]
    generator = torch.Generator().manual_seed(0)
    needed = {
        t["name"]: torch.randn(t["shape"], generator=generator)
        for job in found["jobs"]
        for t in job["tensors"]
        if t["role"] == "input"
    }
    done = launch(where, forward, needed)
    done |= launch(where, backward, needed | done)
    how = {"groups": found["groups"], "eps": found["eps"], "channel_dim": found["channel_dim"]}
    f = normc.parse(found["formula"])
    names = ["x", *(row.name for row in (*f.inputs, *f.params))]
    leaves = {name: needed[name].double().requires_grad_() for name in names}
    results = normc.reference(f)(**leaves, **how)
    results = results if isinstance(results, tuple) else (results,)
    outputs = [t["name"] for t in forward["tensors"] if t["role"] == "output"]
    cotangents = [needed[f"d_{name}"].double() for name in sorted(outputs)]
    grads = torch.autograd.grad(results, list(leaves.values()), cotangents)
    expected = dict(zip(sorted(outputs), results, strict=True))
    expected |= {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    done |= {name: done[held] for name, held in found["gradients"].items()}
    for name, want in expected.items():
        torch.testing.assert_close(done[name].double(), want, rtol=1e-4, atol=1e-4, msg=name)
    print(f"{', '.join(expected)}: all agree")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
