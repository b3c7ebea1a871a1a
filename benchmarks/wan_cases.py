"""What ``wan.py`` trains, and what the closed formulas say of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emulator import Weather

from paceline.config import Config, strategy_name
from paceline.models.describe import describe
from paceline.plan.network import Network
from paceline.sync.base import Load, step_s
from paceline.train.assemble import resolve_model
from paceline.train.settle import settle

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
"""1.6 M parameters, 6.4 MB of gradients, and so little to compute that the sleep decides how long a step takes."""
SEQUENCES, SEQUENCE_TOKENS = 1, 32
"""Sequences a replica and step."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What all syncs of one call of the bench have in common."""

    link: Network
    back: Network
    weather: Weather
    mtu: int
    replicas: int
    steps: int
    """Up to which steps are timed; one more follows, the last of the run."""
    warmup: int
    """Steps before those that are timed."""
    compute_s: float


def config(sync: Any, given: Conditions, output: str = "unused") -> Config:
    """What is trained."""
    parsed = Config.parse(
        {
            "model": {"config": MODEL},
            "data": {"source": "python-docs"},
            "batch": {"sequences": SEQUENCES * given.replicas, "sequence_tokens": SEQUENCE_TOKENS},
            "optimizer": {"name": "adamw", "lr": 2.0e-3},
            "schedule": {"name": "constant", "warmup_steps": 20},
            "precision": "fp32",
            "replicas": given.replicas,
            "sync": sync,
            "train": {"steps": given.steps + 1, "output": output},
            "track": {"display": "none", "tensorboard": False},
        }
    )
    return settle(parsed, say=print)


def formulas(run: Config, given: Conditions, compute_s: float) -> tuple[float, float]:
    """Payload bytes of a step, and its time."""
    source = resolve_model(run)
    assert source is not None
    shapes = {info.name: info.shape for info in describe(source.meta()) if info.trainable}
    slower = min(given.link, given.back, key=lambda side: side.bits_per_s)
    link = Network(slower.bits_per_s, (given.link.delay_s + given.back.delay_s) / 2)
    counted = given.steps - given.warmup
    sent, more_s = 0.0, 0.0
    for sync, size in zip(run.syncs, run.group_sizes, strict=True):
        # What a run of so many steps has more than one of the warm-up; both end with an exchange.
        for steps, sign in ((given.steps + 1, 1), (given.warmup + 1, -1)):
            load = Load(shapes=shapes, members=size, steps=steps, value_bytes=4, compute_s=compute_s)
            sent += sign * sync.wire_bytes(shapes, size, steps)
            more_s += sign * steps * (step_s(sync, link, load) - compute_s)
    return sent / counted, compute_s + more_s / counted


def name_of(run: Config) -> str:
    """How a row is called."""
    words = []
    for sync in run.syncs:
        options = sync.model_dump(mode="json", exclude_unset=True)
        words.append(" ".join([strategy_name(sync), *(_short(key, value) for key, value in options.items())]))
    return " under ".join(words)


def _short(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return value.get("name", "+".join(f"{k}={v}" for k, v in value.items()))
    return str(value) if key == "every" else f"{key}={value}"
