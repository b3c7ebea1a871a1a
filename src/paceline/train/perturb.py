"""Shrink and perturb (Ash & Adams 2020, arXiv 1910.08475): a random restart that keeps a part of what was learned.

weights = shrink * weights + noise * fresh: the fresh ones are first values as the model's own family draws them, from
(seed, step, name). The paper's noise is Gaussian with one standard deviation for all; here each tensor has the scale
it starts with, and a norm's gain of one stays near one where shrink + noise = 1.
"""

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from paceline.config import PerturbConfig
from paceline.errors import PlanError
from paceline.models.initialise import initialise
from paceline.train.replica import ModuleReplica
from paceline.train.state import placed


class Perturb:
    """What is done to the weights after some steps; the same under every layout and on all replicas.

    Keeps the model as it is before it is cut, without memory. Each rank draws the whole model, and takes its own part:
    for a moment it holds one more fp32 copy, in main memory, as it does at the start.
    """

    def __init__(self, config: PerturbConfig | None, whole: nn.Module, *, seed: int, steps: int) -> None:
        """``PlanError`` for a model with parameters that have no rule for first values."""
        self._config, self._seed, self._steps = config, seed, steps
        self._skeleton: nn.Module | None = None
        if config is None:
            return
        empty = {p: nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in whole.parameters()}
        self._skeleton = copy.deepcopy(whole, {id(p): meta for p, meta in empty.items()})
        unset = [name for name, tensor in self._fresh(0).items() if not bool(torch.isfinite(tensor).all())]
        if unset:
            raise PlanError(
                f"perturb: nothing says how {', '.join(unset[:3])} would be drawn anew. Give the module a "
                "reset_parameters, or leave perturb out"
            )

    @torch.no_grad()
    def stepped(self, step: int, replica: ModuleReplica, *, ends_cycle: bool) -> bool:
        """Perturb the weights if it is time after ``step``, never after the last one; whether it was."""
        config = self._config
        if config is None or step >= self._steps or not (ends_cycle if config.at == "cycle" else step in config.at):
            return False
        fresh = self._fresh(step)
        for shard in replica.shards:
            state = placed(shard.parameter, shard.name, replica)
            for block in state.blocks:  # what a rank holds besides is padding, and stays zero
                window = tuple(slice(at, at + size) for at, size in zip(block.start, block.shape, strict=True))
                own = block.of(state.tensor)
                new = fresh[shard.name][window].to(own.device).mul(config.noise)
                own.copy_(new.add_(own, alpha=config.shrink))  # 16 bits are rounded once
        replica.refresh()
        return True

    def _fresh(self, step: int) -> dict[str, Tensor]:
        """First values of all parameters that learn, from (seed, step, name): on the CPU, in fp32 or fp64."""
        skeleton = self._skeleton
        assert skeleton is not None
        drawn = {p: nn.Parameter(_unset(p), p.requires_grad) for p in skeleton.parameters()}
        memo: dict[int, Any] = {id(p): parameter for p, parameter in drawn.items()}
        model = copy.deepcopy(skeleton, memo)
        digest = hashlib.blake2b(f"{self._seed}/perturb/{step}".encode(), digest_size=8).digest()
        initialise(model, int.from_bytes(digest, "big") >> 1)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _unset(parameter: Tensor) -> Tensor:
    """A place for values, with ones that no rule draws."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.full(parameter.shape, torch.nan, dtype=dtype, device="cpu")
