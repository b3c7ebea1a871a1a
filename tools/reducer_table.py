"""Write docs/reference/reducers.md, the table of all reducers, from their config classes.

python tools/reducer_table.py            write the page
python tools/reducer_table.py --check    fail if the page is not what would be written
"""

import math
import sys
from pathlib import Path

from config_reference import summary
from paceline.registry import REDUCERS
from paceline.sync.reducers.base import ReducerConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "reducers.md"
SHAPE = (4096, 1024)
MATRIX = {"model.layers.0.mlp.up_proj.weight": SHAPE}
MEMBERS = (2, 8, 64)
SAID = ", ".join(map(str, MEMBERS[:-1])) + f" or {MEMBERS[-1]}"

HEAD = f"""\
# Reducers

Written by `make docs` from the classes in `paceline.sync.reducers`. Their options stand in [the config
reference](config.md#sync).

A reducer says how tensors of several replicas are added up on the way: gradients (`sync: {{name: all_reduce, reducer:
int8}}`), or what replicas that learned alone have moved by (`sync: {{name: diloco, reducer: int4}}`).

`sent` is what each of {SAID} members sends in one sum, in bytes for each fp32 value of a matrix of
{" x ".join(f"{size:,}" for size in SHAPE)}, with the options it has by default. `kept` is what stays from one sum to
the next, for each value. `feedback` says whether what is left out is kept and sent the next time, by default.

"""
TAIL = """\

## What they have in common

- **No layout shows.** Blocks are of the full tensor in row-major order: 256 values with one scale, 4,096 of which the
  greatest are taken, tiles of 64 x 64, or a whole matrix. The ranks of a replica deal them out among themselves, so
  that each block is whole on one rank, which exchanges it with the ranks that have the same block in the other
  replicas. None depends on the layout. The last block of a tensor is filled up with zeros, which are sent too.
- **Bytes are exact.** What `--dry-run` announces for replicas of one rank each is what goes over the link, to the
  byte. Under a layout ranks share it, each with up to a block more.
- **All replicas get the same bits.** Codes are never added up: each piece has an owner, who decodes what comes in, adds
  it up in fp32 in the order of members, and encodes the sum. Two replicas send each other all pieces, both add up, and
  no sum is encoded.
- **Waiting.** Two replicas wait for one delay of the link in a sum, and for two with `powersgd`, whose second sum waits
  for the first. More wait for one more with codes (`bf16` to `sign`), and in sums of more than a few KB (`mean`,
  `randomk`, `powersgd`) go round a ring. Losses and requests to stop go with gradients, and cost no further delay.
- **What is drawn** follows from the seed, the step, the name, the place and the member, so a second run gives the same.
- **Error feedback.** `error_feedback: true` keeps, in each replica, what encoding left out, and adds it to what is sent
  the next time. Owners keep what the second encoding left out. Nothing is lost: what was put in is what came out plus
  what is kept, unless a `decay` below 1 forgets some of it. It is part of a checkpoint, loads under another layout, and
  with another number of replicas its sum stays.
- **A step that is not taken**, because a gradient overflowed in some replica, leaves all of it as it was.
- **`reduction`** says in what gradients are summed inside a replica; between replicas the reducer does.
- **One replica** sends nothing, and nothing is encoded.

## Which to take

- `bf16` or `fp16` where half the bytes are enough. `fp16` has a power of two for each block, so that nothing overflows.
- `int8` for differences (`diloco`, `local_sgd`): unbiased, and nothing is kept.
- `int4` for differences on slow links. It has equal steps; `format: e3m0` has powers of two, as Streaming DiLoCo, and
  leaves out twice as much where 256 values have a scale ([log](../log.md)).
- `sign`, `topk`, `randomk` and `powersgd` for gradients in every step, where links are slow and plain SGD or momentum
  is what learns. AdamW divides by a mean square that then sees the noise of the encoding: try it before you rely on it,
  or take `onebit_adam`, with `exact_steps` of 15 to 25 % of the run, whose mean square stays.
- `dct_topk` is how DeMo sends momentum. DeMo is `sync: {name: all_reduce, reducer: dct_topk}` with `optimizer: {name:
  lion, betas: [0, 0]}`, which goes by the sign of what arrives. Two small differences stand in the class's file.
- `topk` and `dct_topk` send to all, so their bytes grow with the members; `randomk` does not, and sends no places.
- `powersgd` sends least of those that sum, in two exchanges one after the other.

`sophia`, `lbfgs` and `newton_cg` ask for other gradients of a batch, into which a reducer would mix what it has left
out: refused with `all_reduce`. [Why it is made so](../design/0008-syncs.md)
"""


def main() -> None:
    """Write the page, or compare it."""
    page = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        sys.exit(f"{PAGE} is not what the reducers' classes say: run `make docs` and commit the page")


def render() -> str:
    """The whole page."""
    lines = [
        "| name | what it does | sent | kept | feedback | layout shows | published |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in REDUCERS:
        cls = REDUCERS.load(name)
        options = cls()
        sent = ", ".join(f"{per_value(options, members):.2g}" for members in MEMBERS)
        feedback = getattr(options, "error_feedback", None)
        kept = 4 if feedback else 0
        told = "-" if feedback is None else "yes" if feedback else "no"
        shows = "yes" if getattr(cls, "layout_dependent", False) else "no"
        lines.append(f"| `{name}` | {summary(cls)} | {sent} | {kept} | {told} | {shows} | {cls.source} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


def per_value(options: ReducerConfig, members: int) -> float:
    """Bytes that a member sends for each value of a matrix."""
    return options.wire_bytes(MATRIX, members) / math.prod(SHAPE)


if __name__ == "__main__":
    main()
