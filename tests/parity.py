"""A tiny training run made of the product's own parts, on any number of replicas, for comparing weights."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from paceline.comm import link
from paceline.comm.mesh import Mesh
from paceline.config import choose
from paceline.data.rows import Row
from paceline.data.tokenizer import SpecialTokens
from paceline.objectives.base import Objective, ObjectiveContext
from paceline.objectives.next_token import NextToken
from paceline.optim.base import OptimizerConfig
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.registry import SYNCS
from paceline.schedule.accumulate import Accumulate
from paceline.sync.base import Claiming, Share, Sync, SyncContext
from paceline.train.clip import ClipNorm
from paceline.train.replica import ModuleReplica
from paceline.train.step import train_step
from paceline.workers.pool import Member

VOCABULARY = 61
SEQUENCE_TOKENS = 12
CPU = torch.device("cpu")


def tiny_llama(seed: int = 0) -> nn.Module:
    """An fp64 llama of two blocks, norms at random values so that no gradient term hides behind a one.

    Its norms are torch's, which compute in fp64 too: those of transformers round to fp32, and what a loss is divided by
    on the way back would show.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).double()
    for block in (model.model, *model.model.layers):
        for name, norm in list(block.named_children()):
            if name.endswith("norm"):
                setattr(block, name, nn.RMSNorm(config.hidden_size, norm.variance_epsilon, dtype=torch.float64))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model.train()


def rows(step: int, sequences: int) -> list[Row]:
    """The global batch of a step: rows of uneven lengths, which of them are short depends on the step, and one of them
    without a single target."""
    made = []
    for slot in range(sequences):
        rng = np.random.default_rng([step, slot])
        length = SEQUENCE_TOKENS + 1 if (slot + step // 2) % 3 else 5
        tokens = rng.integers(0, VOCABULARY, length)
        made.append(Row(step * sequences + slot, tokens, np.zeros(0, np.int64), weight=0.0 if slot == 1 else 1.0))
    return made


def share(step: int, sequences: int, index: int, size: int, micro: int) -> list[list[Row]]:
    """The micro-batches of one of ``size`` replicas, filled up with rows of zero weight."""
    own = rows(step, sequences)[index::size]
    largest = math.ceil(sequences / size)
    places = math.ceil(largest / micro) * micro
    filler = Row(10**6, own[0].tokens, own[0].starts, weight=0.0)
    own += [filler] * (places - len(own))
    return [own[i : i + micro] for i in range(0, places, micro)]


def objective() -> Objective:
    """Next token, without any tokenizer."""
    special = SpecialTokens(end=0, vocabulary=VOCABULARY)
    return NextToken().build(ObjectiveContext(special=special, sequence_tokens=SEQUENCE_TOKENS))


def train(
    member: Member | None,
    *,
    steps: int = 3,
    sequences: int = 7,
    micro: int = 4,
    clip_norm: float | None = None,
    sync: dict[str, object] | None = None,
    lr: float = 0.3,
    momentum: float = 0.0,
    freeze: str | None = None,
    dtype: torch.dtype = torch.float64,
    optimizer: OptimizerConfig | None = None,
    same_batch: bool = False,
) -> dict[str, object]:
    """Train a tiny llama, by default with plain SGD; returns losses, norms and the weights after the last step."""
    index, size, store = (member.index, member.size, member.store) if member else (0, 1, None)
    between = link.connect(store, index=index, size=size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True)
    model = tiny_llama().to(dtype)
    if freeze:
        model.get_parameter(freeze).requires_grad_(False)
    adjustments = [ClipNorm(clip_norm)] if clip_norm else []
    optimizer = optimizer or SGD(lr=lr, momentum=momentum)
    replica = ModuleReplica(Masters(model, dtype), optimizer, adjustments, mesh=Mesh.alone())
    options: Any = choose(SYNCS, sync or {"name": "all_reduce", "bucket_mib": 0.002})
    strategy = options.build(SyncContext(link=between, steps=steps))
    strategy.start(replica)
    started_bytes = between.sent_bytes
    goal = objective()
    schedule = Accumulate(model, goal, seed=0, device=CPU)
    losses, norms = [], []
    for step, part in shares_of(strategy, replica, steps, index):
        batches = [
            goal.batch(micro_rows, seed=0, step=step)
            for micro_rows in share(1 if same_batch else step, sequences, part, size, micro)
        ]
        result = train_step(replica, strategy, schedule, batches, step=step, stop=False)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
    weights = {shard.name: shard.local.clone() for shard in replica.shards}
    return {"losses": losses, "norms": norms, "weights": weights, "sent_bytes": between.sent_bytes - started_bytes}


def shares_of(strategy: Sync, replica: ModuleReplica, steps: int, index: int) -> Iterator[Share]:
    """What a replica learns from in a run: its part of each step, or what it claims."""
    if not isinstance(strategy, Claiming):
        yield from (Share(step, index) for step in range(1, steps + 1))
        return
    done = 0
    while done < steps:
        yield strategy.claim(done, replica)[0]
        done = strategy.at


def on_pool(member: Member, options: dict[str, object]) -> dict[str, object]:
    """``train`` as a pool's function."""
    return train(member, **options)  # type: ignore[arg-type]


def assert_equal_training(one: dict[str, object], other: dict[str, object], tolerance: float) -> None:
    """Losses, norms and every weight agree to ``tolerance``, relative to each tensor's norm."""
    for key in ("losses", "norms"):
        assert np.allclose(one[key], other[key], rtol=tolerance, atol=0), (key, one[key], other[key])  # type: ignore[arg-type]
    ours, theirs = one["weights"], other["weights"]
    assert isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys()
    for name in ours:
        error = torch.linalg.vector_norm(ours[name] - theirs[name]) / torch.linalg.vector_norm(ours[name])
        assert error <= tolerance, f"{name} differs by {error:.3g}"


def identical(weights: Sequence[dict[str, object]]) -> bool:
    """All replicas hold the same bits."""
    first = weights[0]["weights"]
    assert isinstance(first, dict)
    return all(torch.equal(first[name], w["weights"][name]) for w in weights for name in first)  # type: ignore[index]
