"""Whole runs of the product's own loop on the pool, for comparing syncs with each other under a layout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paceline.comm.device import claim
from paceline.comm.ranks import Coordinates
from paceline.comm.world import enter
from paceline.config import Config
from paceline.plan.layout import Grid
from paceline.train.assemble import put_together
from paceline.train.state import part_of
from paceline.train.trainer import Loop
from paceline.verify.double import in_double
from paceline.verify.subject import Subject
from paceline.workers.pool import Member, Pool

LLAMA = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}

Boxes = dict[str, list[tuple[tuple[int, ...], Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What came of a run in each replica."""

    losses: list[list[float]]
    """By replica and step."""
    weights: list[dict[str, Tensor]]
    """By replica: full tensors."""
    sent_bytes: list[int]
    """Of the steps, by rank."""
    evaluations: list[float]
    saved: list[list[str]]
    """By rank: the names in the newest checkpoint."""


def config(
    sync: Any, *, folder: str = "unused", replicas: Any = 1, layout: Mapping[str, Any] = {}, **other: Any
) -> Config:
    """A run of plain SGD at a constant rate without clipping; ``other`` sets sections of the config."""
    tree: dict[str, Any] = {
        "model": {"config": LLAMA},
        "data": {"source": "unused"},
        "batch": {"sequences": 6, "sequence_tokens": 23, "micro": 1 if "pipeline" in layout else None},
        "layout": dict(layout),
        "replicas": replicas,
        "sync": sync,
        "optimizer": {"name": "sgd", "lr": 0.3},
        "schedule": {"name": "constant"},
        "train": {"steps": 4, "output": folder, "clip_norm": None},
        "track": {"display": "none", "tensorboard": False},
    }
    for section, values in other.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, Mapping) else values
    return Config.parse(tree)


def ranks(run: Config) -> int:
    """Processes of a run."""
    return run.all_replicas * Grid.of(run.layout).ranks


def on_ranks(member: Member, runs: Sequence[tuple[Config, int]]) -> list[dict[str, Any]]:
    """One rank of some runs of one layout, each from its newest checkpoint up to a step."""
    first, _ = runs[0]
    grid = Grid.of(first.layout)
    place = Coordinates.of(
        member.index,
        replicas=first.all_replicas,
        ranks=grid.ranks,
        local_rank=member.index,
        local_ranks=member.size,
    )
    store = member.store if member.size > 1 else None
    with (
        enter(place, claim(place), store, grid, timeout_s=30.0, loopback=True, group_sizes=first.group_sizes) as world,
        in_double(),
    ):
        return [_run(run, until, world) for run, until in runs]


def _run(run: Config, until: int, world: Any) -> dict[str, Any]:
    subject = Subject.of(run, full=True)
    parts = put_together(run, world, subject.material(torch.float64), dtype=torch.float64, peak_flops_per_s=1.0)
    losses = []
    with Loop(parts) as loop:
        before = world.link.sent_bytes + sum(link.sent_bytes for link in world.links if link is not world.link)
        for event in loop.steps():
            losses.append(event.loss)
            if event.step == until:
                break
        after = world.link.sent_bytes + sum(link.sent_bytes for link in world.links if link is not world.link)
        if until < run.train.steps:
            loop.save()
        loop.finish_saving()
        evaluation = loop.evaluation.loss if loop.evaluation else None
    boxes: Boxes = {}
    for shard in parts.built.replica.shards:
        state = part_of(shard.parameter.detach(), shard.name, parts.built.replica)
        boxes[shard.name] = [(block.start, block.of(state.tensor).clone()) for block in state.blocks]
    return {
        "replica": world.coordinates.replica,
        "losses": losses,
        "boxes": boxes,
        "shapes": {shard.name: tuple(shard.local.shape) for shard in parts.built.replica.shards},
        "sent_bytes": after - before,
        "evaluation": evaluation,
    }


def run_all(pool: Pool, runs: Sequence[Config], *, until: int | None = None) -> list[Ran]:
    """Runs of one layout and one number of replicas, one after the other in the same processes."""
    given = [(run, until or run.train.steps) for run in runs]
    by_rank = pool.run(on_ranks, ranks(runs[0]), given, timeout_s=120.0)
    return [_joined([told[i] for told in by_rank], run) for i, run in enumerate(runs)]


def _joined(told: Sequence[dict[str, Any]], run: Config) -> Ran:
    shapes = {name: p.shape for name, p in Subject.of(run, full=True).source.meta().named_parameters()}
    weights, losses = [], []
    for replica in range(run.all_replicas):
        own = [rank for rank in told if rank["replica"] == replica]
        full = {name: torch.full(shape, float("nan"), dtype=torch.float64) for name, shape in shapes.items()}
        for rank in own:
            for name, boxes in rank["boxes"].items():
                for start, box in boxes:
                    full[name][tuple(slice(a, a + n) for a, n in zip(start, box.shape, strict=True))] = box
        assert all(tensor.isfinite().all() for tensor in full.values())
        weights.append(full)
        losses.append(own[0]["losses"])
    return Ran(
        losses=losses,
        weights=weights,
        sent_bytes=[rank["sent_bytes"] for rank in told],
        evaluations=[rank["evaluation"] for rank in told],
        saved=[],
    )


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The greatest difference of a tensor, relative to its norm."""
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)
