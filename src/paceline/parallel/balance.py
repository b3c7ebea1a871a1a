"""The balance loss of a mixture of experts, by which its routers learn to use all experts (Fedus et al. 2021, Switch
Transformers, arXiv 2101.03961, equations 4 to 6).

For one sequence, over its n targets and over all L routers, with the probabilities p that a router gives:

    balance = E * sum over experts e of  f_e * P_e        f_e = (choices of e) / (L n)        P_e = (sum of p_e) / (L n)

This is transformers' ``load_balancing_loss_func`` of that sequence. Theirs takes a micro-batch for one sequence, and so
depends on which sequences meet. Here every sequence has its own, weighted by n as the losses of its targets are: the
sum over any division of a batch is the same. Positions without a target (padding) count for nothing.

Shapes: B rows, S positions (those that this rank's routers see), T = B x S, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paceline.comm.mesh import Axis, Mesh
from paceline.data.rows import Row
from paceline.errors import ModelError, PlanError
from paceline.objectives.base import Batch, Objective
from paceline.objectives.softening import NO_TARGET
from paceline.parallel.collectives import all_reduce
from paceline.parallel.held import Held

NEAR = 0.02
"""By how much our loss may differ, relatively, from what the family computes: in bf16 a near tie may be chosen
otherwise. Another formula differs by more."""

Outlet = tuple[nn.Module, int]
"""A module, and which of its outputs are a router's logits."""


def balanced(
    model: nn.Module, objective: Objective, sample: Batch, mesh: Mesh, *, sequence: bool, compiled: bool = False
) -> Objective:
    """The objective with the balance loss added to it in training, if the config of a whole model asks for it.

    It does by ``output_router_logits: true``, which is switched off in the model: what the family would make of a
    micro-batch is not used. ``sample`` is a small micro-batch, on which ours is compared with the family's. Raises
    ``PlanError`` for a family that computes something else, for a pipeline, and for compiled blocks.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(config, "output_router_logits", False):
        return objective
    if mesh.pipeline.size > 1:
        raise PlanError(
            f"layout.pipeline={mesh.pipeline.size}: output_router_logits=true adds a loss that takes the routers of "
            "all blocks together, which no stage has. Use output_router_logits=false, or pipeline=1"
        )
    if compiled:
        raise PlanError(
            "train.compile=true with output_router_logits=true is not built: routers are watched, and compiled blocks "
            "do not allow it. Use train.compile=false, or output_router_logits=false"
        )
    coefficient, choices = (
        getattr(model, key, getattr(config, key, None)) for key in ("router_aux_loss_coef", "num_experts_per_tok")
    )
    if coefficient is None or choices is None:
        raise PlanError(
            f"output_router_logits=true: {type(model).__name__} does not say its router_aux_loss_coef and "
            "num_experts_per_tok, so its balance loss is another one than is built. Use output_router_logits=false"
        )
    balance = Balance(
        coefficient=float(coefficient),
        choices=int(choices),
        context=mesh.context,
        sequence=mesh.tensor if sequence else Axis(name="tensor"),
    )
    outlets = _find_outlets(model, sample, balance)
    config.output_router_logits = False
    return Balanced(objective, balance, outlets)


def check_routers(objective: Objective, model: nn.Module, held: Mapping[str, Held], mesh: Mesh) -> None:
    """Raise ``PlanError`` if a router that sees all positions is where ranks compute parts of a gradient."""
    if not isinstance(objective, Balanced) or objective.balance.sequence.size > 1:
        return
    own = {parameter for router, _ in objective.outlets for parameter in router.parameters()}
    for name, parameter in model.named_parameters():
        if parameter in own and name in held and held[name].summed_over is mesh.tensor:
            raise PlanError(
                f"layout.tensor={mesh.tensor.size}: output_router_logits=true adds a loss that every rank computes "
                f"whole, but of {name} each has a part of the gradient. Use output_router_logits=false, or tensor=1"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Balance:
    """The balance loss of one model."""

    coefficient: float
    """By which the loss of a sequence is multiplied (``router_aux_loss_coef``)."""
    choices: int
    """Experts chosen for each token."""
    context: Axis
    """Ranks that have other positions of the same sequences, with the targets of these."""
    sequence: Axis
    """Ranks whose routers see other positions, and that all have all targets."""

    def loss(self, logits: Sequence[Tensor], labels_BS: Tensor) -> Tensor:
        """Times the number of targets, summed over the sequences: scalar, fp32 or more.

        ``logits`` are those of every router, (T, E). What the ranks of ``context`` get is to be added up; all ranks of
        ``sequence`` get the same.
        """
        labels_BS = F.pad(labels_BS, (0, -labels_BS.shape[1] % self.sequence.size), value=NO_TARGET)
        has_target_BS1 = (self.sequence.piece(labels_BS, 1) != NO_TARGET).unsqueeze(-1)
        own = [_of_router(logits_TE, has_target_BS1, self.choices) for logits_TE in logits]
        chosen_BE, probability_BE = (torch.stack(values).sum(0) for values in zip(*own, strict=True))
        counts = torch.cat([chosen_BE, has_target_BS1.sum(1)], 1)  # of these positions, then of the whole sequences
        for axis in (self.context, self.sequence):
            axis.all_reduce(counts, where="balance")
        experts = chosen_BE.shape[1]
        fraction_BE = counts[:, :experts] / counts[:, experts:].clamp(min=1)
        # Linear in the probabilities: the ranks' parts of the sum have the right gradients, each by itself.
        part = self.coefficient * experts / len(logits) ** 2 * (fraction_BE * probability_BE).sum()
        return all_reduce(part, self.sequence, where="balance")


class Balanced:
    """An objective and a balance loss, which is added while the model is in training mode."""

    def __init__(self, objective: Objective, balance: Balance, outlets: Sequence[Outlet]) -> None:
        self.balance, self.outlets = balance, outlets
        self._objective = objective
        self._seen: list[Tensor] | None = None
        for router, index in outlets:
            router.register_forward_hook(self._seer(index))

    def batch(self, rows: Sequence[Row], *, seed: int, step: int) -> Batch:
        """See ``Objective``."""
        return self._objective.batch(rows, seed=seed, step=step)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See ``Objective``."""
        if (
            not model.training or batch.draw is not None
        ):  # labels are drawn to find the curvature of the model's own loss
            return self._objective.loss(model, batch)
        with self._watching() as logits:
            loss = self._objective.loss(model, batch)
        return loss + self.balance.loss(logits, batch.labels)

    @contextmanager
    def _watching(self) -> Iterator[list[Tensor]]:
        """Blocks that are computed again in the backward pass are so outside of it, and count once."""
        seen: list[Tensor] = []
        self._seen = seen
        try:
            yield seen
        finally:
            self._seen = None

    def _seer(self, index: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if self._seen is not None:
                self._seen.append(output if isinstance(output, Tensor) else output[index])

        return hook


def _of_router(logits_TE: Tensor, has_target_BS1: Tensor, choices: int) -> tuple[Tensor, Tensor]:
    """How often each expert was chosen, and the sum of its probabilities, over the targets of each row: (B, E)."""
    rows, positions, _ = has_target_BS1.shape
    if logits_TE.numel() != rows * positions * logits_TE.shape[-1]:
        raise ModelError(
            f"a router gave logits of shape {tuple(logits_TE.shape)} for {rows} rows of {positions} positions, so that "
            "they cannot be told apart by sequence. Use output_router_logits=false"
        )
    dtype = torch.promote_types(logits_TE.dtype, torch.float32)
    probability_BSE = logits_TE.to(dtype).softmax(-1).view(rows, positions, -1)
    chosen_BSE = torch.zeros_like(probability_BSE).scatter_(-1, probability_BSE.detach().topk(choices).indices, 1.0)
    return (chosen_BSE * has_target_BS1).sum(1), (probability_BSE * has_target_BS1).sum(1)


@torch.no_grad()
def _find_outlets(model: nn.Module, sample: Batch, balance: Balance) -> list[Outlet]:
    """Where the logits of all routers come from; ``PlanError`` unless ``balance`` makes the family's loss of them."""
    inputs = {name: value[:1] if isinstance(value, Tensor) else value for name, value in sample.inputs.items()}
    outlets: dict[int, Outlet] = {}
    alive: list[Any] = []

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        alive.append(output)  # or its id might be given to another
        for index, value in enumerate(output if isinstance(output, tuple) else (output,)):
            outlets.setdefault(id(value), (module, index))

    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        output = model.eval()(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    logits, expected = (getattr(output, name, None) for name in ("router_logits", "aux_loss"))
    name = type(model).__name__
    if not logits or not isinstance(expected, Tensor):
        raise PlanError(f"output_router_logits=true: {name} has no balance loss (aux_loss). Use false")
    labels_BS = torch.zeros_like(sample.labels[:1])
    ours = replace(balance, coefficient=1.0, context=Axis(name="context"), sequence=Axis(name="tensor"))
    loss = float(ours.loss(logits, labels_BS) / labels_BS.numel())
    if not abs(loss - float(expected)) <= NEAR * abs(float(expected)) or any(
        id(tensor) not in outlets for tensor in logits
    ):
        raise PlanError(
            f"output_router_logits=true: the balance loss of {name} is {float(expected):.6g}, not the {loss:.6g} that "
            "follow from its routers' probabilities, so it is another one. Use output_router_logits=false"
        )
    return [outlets[id(tensor)] for tensor in logits]
