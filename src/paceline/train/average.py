"""An average of the weights beside them: kept up to date, saved, and put in their place to be measured."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paceline.comm.link import Link
from paceline.comm.replica import local_part
from paceline.config import strategy_name
from paceline.errors import PlanError
from paceline.optim.average import NoAverage, WeightAverage
from paceline.train.replica import ModuleReplica


class Average:
    """This rank's part of the average of all weights; of each parameter what the rank holds of it, and like it.

    The update is element by element, so a part of the average is the average of a part, under every layout. A replica
    that learns alone averages its own weights; what is measured and exported is the mean of the replicas' averages.
    """

    def __init__(self, options: WeightAverage | NoAverage, replica: ModuleReplica) -> None:
        self._options, self._replica = options, replica
        self._name = strategy_name(options)
        self.taken = 0
        """How many weights stand in the average."""
        self.tensors: Mapping[str, Tensor] = {
            shard.name: _wide(shard.parameter.detach()) for shard in replica.shards if options.keeps
        }
        """By parameter; a restore fills them."""

    @property
    def is_measured(self) -> bool:
        """Whether evaluations are of the average: it is asked for, and there is one."""
        return self._options.evaluate and self.taken > 0

    @property
    def is_exported(self) -> bool:
        """Whether the export is of the average: it is asked for, and there is one."""
        return self._options.export and self.taken > 0

    @torch.no_grad()
    def stepped(self, step: int, *, ends_cycle: bool) -> None:
        """Take the weights after a step, if it is one of those that count."""
        every, start = self._options.every, self._options.start
        due = ends_cycle if every == "cycle" else every > 0 and (step - start) % every == 0
        if self._options.keeps and step > start and due:
            means = [local_part(mean) for mean in self.tensors.values()]
            weights = [weight.to(mean.dtype) for weight, mean in zip(self._weights(), means, strict=True)]
            torch._foreach_lerp_(means, weights, self._options.weight(self.taken))
            self.taken += 1

    @property
    def measured(self) -> Mapping[str, Tensor]:
        """This rank's values of what is evaluated in place of the parameters, by name; empty if these are."""
        return {name: local_part(mean) for name, mean in self.tensors.items()} if self.is_measured else {}

    def values(self) -> dict[str, Any]:
        """The scalars of a checkpoint."""
        return {"name": self._name, "taken": self.taken}

    def restored(self, values: Mapping[str, Any] | None) -> Mapping[str, Tensor]:
        """Go on from the ``values`` of a checkpoint, and return the tensors that are to be filled from it.

        Where the checkpoint has no average, or one of another kind, there are none: this one begins anew.
        """
        if not self._options.keeps or values is None or values["name"] != self._name:
            return {}
        self.taken = values["taken"]
        return self.tensors

    def _weights(self) -> list[Tensor]:
        return [shard.local for shard in self._replica.shards]


def over_replicas(link: Link, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean over all replicas of tensors of the same names, each replica counting the same."""
    means = {name: tensor / link.size for name, tensor in tensors.items()}
    for pending in [link.all_reduce(mean) for mean in means.values()]:
        pending.wait()
    return means


def _wide(parameter: Tensor) -> Tensor:
    """A copy in fp32 at least: in 16 bits, what a long average takes of the weights would be rounded away."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


def check_statistics(model: nn.Module) -> None:
    """``PlanError`` for a model with running statistics, which are those of the weights that are trained."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            raise PlanError(
                f"average: {name} keeps running statistics of the weights that are trained, with which their average "
                "cannot be measured. Use average=none, or a norm without running statistics"
            )
