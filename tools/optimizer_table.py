"""Write docs/reference/optimizers.md, the table of all optimizers, from their config classes.

python tools/optimizer_table.py            write the page
python tools/optimizer_table.py --check    fail if the page is not what would be written
"""

import math
import sys
from pathlib import Path

from config_reference import summary
from paceline.optim.base import OptimizerConfig
from paceline.registry import OPTIMIZERS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "optimizers.md"
MATRIX, VECTOR = ("model.layers.0.mlp.up_proj.weight", (4096, 1024)), ("model.norm.weight", (1024,))
LOOKS_AT = {
    "values": "values",
    "gradients": "values, and another gradient now and then",
    "tensors": "whole tensors",
    "loss": "the loss, again and again",
}
LAYOUTS = {"values": "all", "gradients": "all", "tensors": "all", "loss": "replicas"}

HEAD = f"""\
# Optimizers

Written by `make docs` from the classes in `paceline.optim`. Their options stand in [the config
reference](config.md#optimizer).

`state` is what is kept besides the parameter, in bytes for each fp32 value: of a matrix of a block, here
{MATRIX[1][0]:,} x {MATRIX[1][1]:,}, and of a vector. Under a layout the ranks share it as they share parameters.
`code` says whose code makes the update. Each is tested against its publication or the library that defines it, for
twelve steps in fp64; goes on bit for bit after a resume; and makes the same update under `shard`, `tensor` and both
as in one process.

"""
TAIL = """\

## Parameters of their own

Matrices decay by `weight_decay`; norms, biases and other vectors do not. `groups` says what else is different for
some:

```yaml
optimizer:
  name: adamw
  lr: 3.0e-4
  groups:
    - {match: "*embed*", lr_factor: 0.1, weight_decay: 0}   # a tenth of the rate
    - {match: "*.bias", weight_decay: 0.1}                  # vectors decay where it is said
    - {match: "*layers.0.*", lr: 1.0e-4}                    # a rate of their own
```

`match` is a pattern of whole names with `*` and `?`; the names are those of the model's own parameters, as in a
checkpoint. The first group that matches a name has it, and a group that gets no parameter is an error. The schedule
multiplies every rate. `lbfgs` and `newton_cg` have one rate for all.

## Under a layout

- **Values.** An optimizer sees plain local tensors: of a parameter that ranks share, this rank's values. What updates
  each value by itself cannot notice. On a CPU our own go through a few thousand values at a time with all their
  operations, so that memory is read and written once.
- **Sums.** `lamb` and `adafactor` add up norms, and means of rows and columns, over the ranks that hold parts: one
  small exchange or two in a step. The means are whole on every rank.
- **Whole matrices.** For `muon`, `shampoo` and `soap` each matrix has an owner among the ranks that hold its parts.
  The costliest go first, each to the rank with the least to do. All parts travel to their owners in one exchange,
  each owner computes, and the results travel back in another, so that no direction is computed twice but for
  replicas. On its way a rank holds about three more of its own share of the matrices. What `shampoo` and `soap` keep of
  a matrix lies with the owner alone, so the ranks share that too. Momentum of `muon` lies where the parameter's
  values are.
- **8 bits.** Blocks of `adamw_8bit` are 256 neighbours in a row of the full tensor. Where `tensor` cuts rows, the
  ranks agree on the scales of the blocks. So codes are the same under every layout, and a checkpoint holds them as
  they are.
- **The loss.** `lbfgs` and `newton_cg` evaluate the batch many times in a step, which only whole models do: replicas,
  in fp32, without clipping. Any other layout is refused with the reason.

`paceline verify` compares gradients in a run of SGD, and judges an optimizer that looks beyond single values in a
second run, by its updates on equal gradients. [What it does](../guides/layouts.md#verify)

## What is particular

- `schedule_free_adamw` averages weights in place of a schedule, so it asks for `schedule: constant`. Evaluation,
  export and the weights of a checkpoint are the averages; the checkpoint keeps the point where gradients are taken
  beside them.
- `sophia` is Sophia-G: every `every` steps the model draws labels from its own distribution, and a second gradient
  for these gives the curvature. What is drawn follows from seed, step, sequence and position. Such a step costs two.
- `soap` needs a basis where a covariance is zero. Rounding would choose one, and under each layout another; here it
  is fixed. It divides by an average that may be rounding alone in such a direction, so that roundings of a gradient
  grow faster in it than in the others: on a small model in fp64 from 1e-16 to 1e-10 within twenty steps.
- `muon`, `shampoo` and `soap` treat each matrix of a stack of experts by itself. Parameters of one dimension, of four
  and more, and for `muon` embeddings and heads, are AdamW's.
- `muon` makes matrices of one shape orthogonal together, in bf16. A small one that is alone rounds otherwise in the
  last bit, and with other owners others are alone. In fp64 that is not seen.
- `onebit_adam` is AdamW as long as sums of gradients are exact. With `sync: {name: all_reduce, reducer: sign,
  exact_steps: 2000}` it has its average summed in place of the gradient after that many steps, and leaves its average
  square as it is. [Reducers](reducers.md)
- `ftrl` starts at the model's weights, where the publication starts at zero, and takes the rate of each step as it
  is. Its `weight_decay` is lambda 2.
- [Why so few of these come from a library](../design/0007-optimizers.md)
"""


def main() -> None:
    """Write the page, or compare it."""
    page = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        sys.exit(f"{PAGE} is not what the optimizers' classes say: run `make docs` and commit the page")


def render() -> str:
    """The whole page."""
    lines = [
        "| name | what it is | state: matrix, vector | looks at | layouts | published | code |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in OPTIMIZERS:
        cls = OPTIMIZERS.load(name)
        state = ", ".join(f"{bytes_per_value(cls(), *tensor):.3g}" for tensor in (MATRIX, VECTOR))
        looks, layouts = LOOKS_AT[cls.sees], LAYOUTS[cls.sees]
        lines.append(f"| `{name}` | {summary(cls)} | {state} | {looks} | {layouts} | {cls.source} | {cls.code} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


def bytes_per_value(options: OptimizerConfig, name: str, shape: tuple[int, ...]) -> float:
    """Bytes of state for each value of one fp32 parameter."""
    return options.state_bytes({name: shape}) / math.prod(shape)


if __name__ == "__main__":
    main()
