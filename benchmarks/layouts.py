"""Layouts of one model on this machine, beside one process: speed, memory, states, and bytes sent.

    python benchmarks/layouts.py [--layouts "shard=4; tensor=2"] [--steps 5] [--warmup 2] [--quick] [--json]

Every layout trains the same Llama from the same weights on the same random rows, in fp32 with AdamW and clipping, in
fresh processes with an equal share of the cores. ``--layouts`` as ``paceline verify`` reads them. For a rank:

    peak     the most resident memory since before the model was built, above what there was then
    states   bytes of parameters, gradients and optimizer states at the end of a step, counted tensor by tensor
    sent     bytes that it gives to collectives and sends in a step

of the rank that has most. More ranks than cores make no step faster: then only memory and bytes mean something.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from contenders import Clock

from paceline.comm.device import claim
from paceline.comm.ranks import Coordinates
from paceline.comm.replica import Finish, local_part
from paceline.comm.world import enter
from paceline.config import BatchConfig, LayoutConfig, ModelConfig, choose
from paceline.data.rows import Row
from paceline.data.tokenizer import SpecialTokens
from paceline.errors import PlanError
from paceline.models.source import ModelSource
from paceline.objectives.base import ObjectiveContext
from paceline.objectives.next_token import NextToken
from paceline.optim.adamw import AdamW
from paceline.plan.batch import BatchPlan, plan_batch
from paceline.plan.layout import check_offload
from paceline.plan.precision import PRECISIONS
from paceline.plan.stages import check_schedule
from paceline.registry import SYNCS
from paceline.sync.base import SyncContext
from paceline.train.build import Built, Goal, build
from paceline.train.clip import ClipNorm
from paceline.train.step import train_step
from paceline.verify.cases import Case, parse
from paceline.workers.pool import Member, Pool

VOCABULARY = 8192
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""31 M parameters: 500 MB of states, against which the activations of a few short rows are small."""
QUICK = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}
SEQUENCES, SEQUENCE_TOKENS = 8, 64
DEFAULT = "shard=2; shard=4; shard=4,zero=1; tensor=2; tensor=2,sequence=true; context=2; pipeline=2; shard=2,tensor=2"
COLUMNS = {"tokens/s": 10, "peak MiB": 10, "states MiB": 11, "share": 7, "sent MiB": 10, "loss": 9}
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a layout took; bytes are of the rank that has most."""

    layout: str
    ranks: int
    tokens_per_s: float
    peak_bytes: int
    state_bytes: int
    sent_bytes: float
    loss: float
    """Of the last step: shows that the layouts learn alike."""


def measure(case: Case, model: dict[str, Any], *, steps: int, warmup: int) -> Result:
    """Run a layout in processes of its own. Raises ``PlanError`` if it is refused."""
    plan(case)
    with Pool(case.ranks) as pool:
        ranks = pool.run(train, case.ranks, case, model, steps, warmup, timeout_s=1800.0)
    if refusals := [rank["refused"] for rank in ranks if "refused" in rank]:
        raise PlanError(refusals[0])
    return Result(
        layout=case.name,
        ranks=case.ranks,
        tokens_per_s=steps * SEQUENCES * SEQUENCE_TOKENS / max(rank["seconds"] for rank in ranks),
        peak_bytes=max(rank["peak_bytes"] for rank in ranks),
        state_bytes=max(rank["state_bytes"] for rank in ranks),
        sent_bytes=max(rank["sent_bytes"] for rank in ranks),
        loss=ranks[0]["loss"],
    )


def plan(case: Case) -> BatchPlan:
    """How the batch is dealt out: pipelines get single rows. Raises ``PlanError`` for what no model can have."""
    data_parallel = case.replicas * case.grid.shard
    if SEQUENCES % data_parallel:
        raise PlanError(f"{SEQUENCES} sequences a step do not divide by the {data_parallel} data ranks of {case.name}")
    share = SEQUENCES // data_parallel
    micro = 1 if case.layout.pipeline > 1 else -(-share // (case.accumulate or 1))
    batch = BatchConfig(sequences=SEQUENCES, sequence_tokens=SEQUENCE_TOKENS, micro=micro)
    check_offload(case.layout, case.replicas)
    check_schedule(case.layout, planned := plan_batch(batch, data_parallel), compiled=False)
    return planned


def train(member: Member, case: Case, model: dict[str, Any], steps: int, warmup: int) -> dict[str, Any]:
    """One rank of a layout: some steps, and what it used."""
    coordinates = Coordinates.of(
        member.index, replicas=case.replicas, ranks=case.grid.ranks, local_rank=member.index, local_ranks=member.size
    )
    device = claim(coordinates)
    store = member.store if member.size > 1 else None
    with enter(coordinates, device, store, case.grid, timeout_s=600.0, loopback=True) as world:
        context = ObjectiveContext(
            special=SpecialTokens(vocabulary=model["vocab_size"], end=0), sequence_tokens=SEQUENCE_TOKENS
        )
        options = NextToken()
        objective = options.build(context)
        sample = objective.batch(rows(0, model)[:2], seed=SEED, step=0)
        clock = Clock()
        try:
            built = build(
                ModelSource.of(ModelConfig(config=model), "causal").build(SEED),
                Goal(objective=objective, options=options, context=context, sample=sample),
                layout=case.layout,
                mesh=world.mesh,
                optimizer=AdamW(),
                adjust=lambda _: [ClipNorm(1.0)],
                precision=PRECISIONS["fp32"],
                device=device.torch_device,
                seed=SEED,
            )
        except PlanError as error:
            return {"refused": str(error)}
        sync: Any = choose(SYNCS, "all_reduce")
        scales = Scales(sync.build(SyncContext(link=world.link, steps=warmup + steps)), built)
        scales.sync.start(built.replica)
        for step in range(warmup + steps):
            if step == warmup:
                world.mesh.tally.clear()
                sent_before = world.link.sent_bytes
            own, micro = rows(step, model)[world.data_rank :: world.data_ranks], plan(case).micro
            shares = [own[i : i + micro] for i in range(0, len(own), micro)]
            batches = [built.split(objective.batch(share, seed=SEED, step=step)) for share in shares]
            result = train_step(built.replica, scales, built.schedule, batches, step=step, stop=False)  # type: ignore[arg-type]
            clock.tick()
        return {
            "seconds": clock.ends[-1] - clock.ends[warmup - 1],
            "peak_bytes": clock.peak_bytes(),
            "state_bytes": scales.state_bytes,
            "sent_bytes": (sum(world.mesh.tally.bytes.values()) + world.link.sent_bytes - sent_before) / steps,
            "loss": result.loss,
        }


class Scales:
    """A sync that weighs the states each time gradients are complete, and is otherwise the one it wraps."""

    def __init__(self, sync: Any, built: Built) -> None:
        self.sync, self._replica = sync, built.replica
        self.begin, self.total, self.reduce = sync.begin, sync.total, sync.reduce
        self.state_bytes = 0

    def update(self, replica: Any) -> Finish:
        """See ``Sync``."""
        shards = self._replica.shards
        tensors = [shard.local for shard in shards]
        tensors += [gradient for shard in shards if (gradient := shard.gradient) is not None]
        for state in self._replica.optimizer.state.values():
            tensors += [local_part(value) for value in state.values() if isinstance(value, torch.Tensor)]
        self.state_bytes = sum(tensor.nbytes for tensor in tensors)
        finish: Finish = self.sync.update(replica)
        return finish


def rows(step: int, model: dict[str, Any]) -> list[Row]:
    """The global batch of a step."""
    rng = np.random.default_rng([SEED, step])
    tokens = rng.integers(0, model["vocab_size"], (SEQUENCES, SEQUENCE_TOKENS + 1))
    return [Row(step * SEQUENCES + i, row, np.zeros(1, np.int64)) for i, row in enumerate(tokens)]


def line(result: Result, alone: Result) -> str:
    """A row of the table, with the share of one process's states."""
    return (
        f"{result.layout:<32}{result.ranks:>5}{result.tokens_per_s:>10,.0f}{result.peak_bytes / 2**20:>10,.0f}"
        f"{result.state_bytes / 2**20:>11,.1f}{result.state_bytes / alone.state_bytes:>7.2f}"
        f"{result.sent_bytes / 2**20:>10,.1f}{result.loss:>9.4f}"
    )


def compare(cases: Sequence[Case], model: dict[str, Any], *, steps: int, warmup: int) -> list[Result]:
    """One process, then each layout; prints a line as each ends."""
    print(f"{'layout':<32}{'ranks':>5}" + "".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
    alone = measure(Case(layout=LayoutConfig()), model, steps=steps, warmup=warmup)
    results = [alone]
    print(line(alone, alone), flush=True)
    for case in cases:
        try:
            results.append(measure(case, model, steps=steps, warmup=warmup))
            print(line(results[-1], alone), flush=True)
        except PlanError as error:
            print(f"{case.name:<32} refused: {error}", flush=True)
    return results


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=DEFAULT, help=f"default: {DEFAULT}")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, at least one")
    parser.add_argument("--quick", action="store_true", help="a model of 0.2 M parameters, to see that it works")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    given = parser.parse_args()
    model = {**MODEL, **QUICK} if given.quick else MODEL
    print(f"{len(os.sched_getaffinity(0))} core(s); {SEQUENCES} x {SEQUENCE_TOKENS} tokens a step, fp32, AdamW")
    results = compare(parse(given.layouts), model, steps=given.steps, warmup=max(1, given.warmup))
    if given.json:
        print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
