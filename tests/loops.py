"""Whole runs of the product's own loop on the pool, for comparing syncs with each other under a layout."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paceline.checkpoint import Kind
from paceline.comm.device import claim
from paceline.comm.ranks import Coordinates
from paceline.comm.world import World, enter
from paceline.config import Config
from paceline.plan.layout import Grid
from paceline.plan.precision import PRECISIONS, Precision
from paceline.train.assemble import Parts, put_together
from paceline.train.state import tensors
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

Boxes = dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], Tensor]]]]
"""By name: the full shape, and start and values of each box."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What came of a run in each replica."""

    losses: list[list[float]]
    """By replica and step."""
    states: list[dict[str, Tensor]]
    """By replica: all that a checkpoint would hold, as full tensors."""
    sent_bytes: list[int]
    """Of the steps, by rank."""
    rates: list[list[float]]
    """By replica and step."""
    evaluations: list[float | None]
    """The newest held-out loss, as each rank has it."""

    @property
    def weights(self) -> list[dict[str, Tensor]]:
        """By replica: the model's part of the states."""
        return [
            {slot.removeprefix("model/"): t for slot, t in full.items() if slot.startswith("model/")}
            for full in self.states
        ]


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
    with world_of(member, runs[0][0]) as world:
        return [_run(run, until, world) for run, until in runs]


@contextmanager
def world_of(member: Member, run: Config) -> Iterator[World]:
    """Join as one rank of a run."""
    grid = Grid.of(run.layout)
    place = Coordinates.of(
        member.index, replicas=run.all_replicas, ranks=grid.ranks, local_rank=member.index, local_ranks=member.size
    )
    store = member.store if member.size > 1 else None
    doubles = in_double() if precision_of(run).name == "fp64" else nullcontext()
    with (
        enter(place, claim(place), store, grid, timeout_s=30.0, loopback=True, group_sizes=run.group_sizes) as world,
        doubles,
    ):
        yield world


def precision_of(run: Config) -> Precision:
    """What a run says, or fp64, which a config does not know."""
    return PRECISIONS["fp64" if run.precision == "auto" else run.precision]


def loop_of(run: Config, world: World) -> Loop:
    """The loop of a run whose rows are made up."""
    precision = precision_of(run)
    material = Subject.of(run, full=True).material(torch.float64 if precision.name == "fp64" else torch.float32)
    return Loop(put_together(run, world, material, precision=precision, peak_flops_per_s=1.0))


def _run(run: Config, until: int, world: World) -> dict[str, Any]:
    losses, rates = [], []
    with loop_of(run, world) as loop:
        before, first = _sent_bytes(world), loop.step
        for event in loop.steps() if until > first else ():
            losses.append(event.loss)
            rates.append(event.lr)
            if loop.step == until:
                break
        sent_bytes = _sent_bytes(world) - before
        is_due = run.checkpoint.every > 0 and until % run.checkpoint.every == 0  # then it has been saved
        if first < until < run.train.steps and not is_due:
            loop.save()
        loop.finish_saving()
    return {
        "replica": world.coordinates.replica,
        "losses": losses,
        "rates": rates,
        "boxes": _boxes(loop.parts),
        "sent_bytes": sent_bytes,
        "evaluation": loop.evaluation.loss if loop.evaluation else None,
    }


def _sent_bytes(world: World) -> int:
    """Over the links of all levels."""
    return sum(link.sent_bytes for link in {id(link): link for link in (world.link, *world.links)}.values())


def _boxes(parts: Parts) -> Boxes:
    """All that a checkpoint would hold of this rank, each replica's by itself."""
    boxes: Boxes = {}
    average = parts.average.tensors
    here = tensors(parts.built.model, parts.built.replica, parts.sync, parts.variant, average=average)
    for slot, state in here.items():
        axis = int(state.kind is Kind.PER_REPLICA)
        own = [(block.start[axis:], block.of(state.tensor).clone().view(block.shape[axis:])) for block in state.blocks]
        boxes[slot] = state.full_shape[axis:], own
    return boxes


def run_all(pool: Pool, runs: Sequence[Config], *, until: int | None = None) -> list[Ran]:
    """Runs of one layout and one number of replicas, one after the other in the same processes, up to a step."""
    given = [(run, run.train.steps if until is None else until) for run in runs]
    by_rank = pool.run(on_ranks, ranks(runs[0]), given, timeout_s=120.0)
    return [_joined([told[i] for told in by_rank], run) for i, run in enumerate(runs)]


def _joined(told: Sequence[dict[str, Any]], run: Config) -> Ran:
    states, losses, rates = [], [], []
    for replica in range(run.all_replicas):
        own = [rank for rank in told if rank["replica"] == replica]
        full: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        for rank in own:
            for slot, (shape, boxes) in rank["boxes"].items():
                for start, box in boxes:
                    window = tuple(slice(a, a + n) for a, n in zip(start, box.shape, strict=True))
                    full.setdefault(slot, torch.empty(shape, dtype=box.dtype))[window] = box
                    seen.setdefault(slot, torch.zeros(shape, dtype=torch.bool))[window] = True
        assert all(mask.all() for mask in seen.values())
        states.append(full)
        losses.append(own[0]["losses"])
        rates.append(own[0]["rates"])
    return Ran(
        losses=losses,
        rates=rates,
        states=states,
        sent_bytes=[rank["sent_bytes"] for rank in told],
        evaluations=[rank["evaluation"] for rank in told],
    )


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The greatest difference of a tensor, relative to its norm."""
    assert one.keys() == other.keys()
    pairs = [(tensor.double(), other[name].double()) for name, tensor in one.items()]
    return max(float((own - same).norm() / (own.norm() or 1.0)) for own, same in pairs)
