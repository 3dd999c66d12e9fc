"""What a formula becomes: other spellings, programs, plans, the bytes they move, and source."""

from __future__ import annotations

import torch

import normc


def main() -> None:
    """Print what the compiler makes of root mean square normalization."""
    formula = normc.parse("x/sqrt(channel_mean(x*x) + eps) * gamma")
    print("canonical:", formula.canonical())
    print("the zoo's:", normc.zoo["rms_norm"].canonical())
    print("LaTeX:    ", formula.latex())

    op = normc.compile(formula)
    tokens = torch.randn(2, 128, 512)  # (batch, position, channel)
    print("\n--- op.explain(tokens, channel_dim=-1)\n")
    print(op.explain(tokens, channel_dim=-1))

    print('\n--- op.source("c"), the first lines\n')
    print("\n".join(op.source("c").splitlines()[:12]))

    print("\n--- with normc.config.override(debug=1): the first call in a cold cache compiles\n")
    with normc.config.override(debug=1, cache=False):
        op(tokens, channel_dim=-1, gamma=torch.ones(512))


if __name__ == "__main__":
    main()
