"""A layer that nobody has a kernel for: written, corrected, checked, and used in training."""

from __future__ import annotations

import torch

import normc
from normc.analysis.agreement import cases, compare

MISTAKE = "h = (x - batch_mean(x)/batch_std(x); h*sigmoid(v*h)"

FORMULA = """
param alpha = 0.5                                   # a learned scalar
input scale[n,c]                                    # one value per sample and channel, as in FiLM
h = (x - batch_mean(x)) / max(batch_std(x), alpha*instance_std(x))
h*sigmoid(v*h) * (1 + scale) + beta
"""


def main() -> None:
    """Print an error, the tensors of the formula, its measured error, its running statistics."""
    try:
        normc.parse(MISTAKE)
    except normc.FormulaError as error:
        print(f"a mistake is shown where it is:\n{error}\n")

    formula = normc.parse(FORMULA)
    print("learned:", ", ".join(p.name for p in formula.params))
    print("given at every call:", ", ".join(i.name for i in formula.inputs))

    for case in cases(seed=1, count=2, ranks=[4]):  # two shapes, in float64 and float32
        worst = max(compare(formula, case), key=lambda e: e.error / e.limit)
        print(f"{case.show()}: worst is {worst.tensor}, {worst.error:.0e} of {worst.limit:.0e}")

    torch.manual_seed(0)
    layer = normc.Layer(formula, 8)
    for _ in range(100):
        layer(3 * torch.randn(16, 8, 5, 5) + 2, scale=torch.zeros(16, 8))
    print("after 100 batches of mean 2 and variance 9:")
    for name, buffer in layer.named_buffers():
        print(f"  {name} = {[round(float(value), 1) for value in buffer.flatten()]}")

    x, scale = torch.randn(1, 8, 5, 5), torch.zeros(1, 8)
    alone = layer.eval()(x, scale=scale)
    together = layer(torch.cat([x, 50 * x]), scale=torch.zeros(2, 8))[:1]
    print("in evaluation a sample does not see its batch:", torch.equal(alone, together))


if __name__ == "__main__":
    main()
