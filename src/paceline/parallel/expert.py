"""Expert parallelism: the experts of a mixture are dealt out to ranks, and tokens travel to the experts they chose
(Lepikhin et al. 2020, GShard, arXiv 2006.16668, section 2).

The ranks of ``mesh.expert`` are neighbours on ``mesh.states``: each has tokens of its own, and some of the experts.

    every token, once for each expert it chose   ->  the rank of that expert     exchange_rows
    the experts' own computation, with weights of one
    what they make of it                         ->  back to the token's rank    exchange_rows
    the sum over the chosen, by the router's weights

So the gradient of the router is whole at home, and that of an expert the sum over the tokens of all these ranks.

Shapes: T tokens of this rank, K experts chosen for each, D width, R rows that this rank's experts compute.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from paceline.comm.mesh import Axis, Mesh
from paceline.errors import PlanError
from paceline.objectives.base import Batch, logits_of
from paceline.parallel.collectives import exchange_rows
from paceline.parallel.held import Cut, Held, Run
from paceline.parallel.kept import kept
from paceline.plan.layout import nearest_divisor

TOKENS = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),
)
"""Arguments of experts: (T, D), and for every token the experts it chose and their weights, (T, K)."""

NEAR, SMALLEST = 0.03, 1e-20
"""How much of its largest output may be rounding, in bf16 too; another computation differs by more."""

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


def find_experts(model: nn.Module) -> dict[str, Any]:
    """The modules of a model that are all experts of a mixture in one, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if tuple(inspect.signature(module.forward).parameters) in TOKENS
    }


def check_experts(model: nn.Module, sample: Batch, mesh: Mesh) -> None:
    """Raise ``PlanError``, naming the module, unless the experts of a whole model can be dealt out to ranks.

    What a family's experts make of tokens that come one by one cannot be read from their arguments alone, so it is
    tried on ``sample``, a small micro-batch: the ranks are played one after the other.
    """
    size = mesh.expert.size
    found = find_experts(model)
    if not found:
        raise PlanError(
            f"layout.expert={size}: {type(model).__name__} has no module of experts that is called with "
            f"({', '.join(TOKENS[0])}). Use expert=1"
        )
    for name, module in found.items():
        experts, shapes = getattr(module, "num_experts", 0), [tuple(p.shape) for p in module.parameters()]
        own_shapes = [tuple(p.shape) for p in module.parameters(recurse=False)]
        if not own_shapes or own_shapes != shapes or any(shape[:1] != (experts,) for shape in shapes):
            raise PlanError(
                f"layout.expert={size}: {name}, a {type(module).__name__}, has parameters of shapes "
                f"{', '.join(map(str, shapes))}; expected each to have a row for each of num_experts={experts}. "
                "Use expert=1"
            )
        if experts % size:
            raise PlanError(
                f"layout.expert={size} does not divide the {experts} experts of {name}. Use expert="
                f"{nearest_divisor(size, experts, mesh.states.size)}"
            )
    _try(model, sample, found, size)


def cut_experts(model: nn.Module, mesh: Mesh, held: Mapping[str, Held]) -> dict[str, Held]:
    """Leave of every module of experts those of this rank, and send tokens where their experts are.

    ``held`` is what passes before this one say; returns what is now to be said of the parameters of experts. The model
    is one that ``check_experts`` has seen, or a stage of it.
    """
    axis, said = mesh.expert, dict[str, Held]()
    if axis.size == 1:
        return said
    for name, module in find_experts(model).items():
        module.forward = _Dispatched(module, axis, name)
        module.num_experts //= axis.size
        own = Cut(0, (Run(axis.index * module.num_experts, module.num_experts, 0),))
        for key, full in list(module.named_parameters(recurse=False)):
            local = nn.Parameter(axis.piece(full.detach(), 0).clone(), requires_grad=full.requires_grad)
            setattr(module, key, local)
            whole = Held(full_shape=tuple(full.shape), is_owner=mesh.tensor.index == 0)
            before = held.get(f"{name}.{key}", whole)
            said[f"{name}.{key}"] = replace(before, cuts=(*before.cuts, own))
    return said


class _Dispatched:
    """The forward of a module of experts that holds some of them."""

    def __init__(self, module: Any, axis: Axis, where: str) -> None:
        self._module, self._axis, self._where = module, axis, where
        self._compute: Compute = module.forward
        self._names = tuple(inspect.signature(module.forward).parameters)
        self._own_experts: int = module.num_experts // axis.size

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        hidden_TD, chosen_TK, weights_TK = _named(self._names, args, kwargs)
        ranks, own, choices = self._axis.size, self._own_experts, chosen_TK.shape[1]
        order = chosen_TK.flatten().argsort(stable=True)  # by expert, and so by rank
        sent_counts = chosen_TK.flatten().bincount(minlength=ranks * own).view(ranks, own)
        # Of each rank's tokens for own experts.
        counts = kept(lambda: self._axis.all_to_all(sent_counts, 0, 0, where=self._where))
        sent, received = torch.stack([sent_counts.sum(1), counts.sum(1)]).tolist()
        rows_RD = exchange_rows(hidden_TD[order // choices], self._axis, sent, received, where=self._where)
        chosen_R = torch.arange(own, device=counts.device).repeat(ranks).repeat_interleave(counts.flatten())
        made_RD = exchange_rows(self._made(rows_RD, chosen_R), self._axis, received, sent, where=self._where)
        return _weighted(made_RD, order, weights_TK)

    def _made(self, rows_RD: Tensor, chosen_R: Tensor) -> Tensor:
        """What this rank's experts make of rows, which in the backward pass go back even if there are none: all ranks
        take part in the exchange, and in summing gradients of experts, which are zero then."""
        if len(rows_RD):
            return _one_by_one(self._compute, rows_RD, chosen_R)
        parameters: list[Tensor] = list(self._module.parameters())
        return rows_RD + torch.stack([parameter.flatten()[:0].sum() for parameter in parameters]).sum()


def _named(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, choices and weights, from the arguments of a call."""
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    hidden_TD, chosen_TK, weights_TK = (named[name] for name in names)
    return hidden_TD, chosen_TK, weights_TK


def _one_by_one(compute: Compute, rows_RD: Tensor, chosen_R: Tensor) -> Tensor:
    """What one expert makes of each row."""
    return compute(rows_RD, chosen_R.unsqueeze(1), rows_RD.new_ones(len(rows_RD), 1))


def _weighted(made_RD: Tensor, order: Tensor, weights_TK: Tensor) -> Tensor:
    """The sum over each token's choices, from what was made of them in the order of experts: (T, D)."""
    made_TKD: Tensor = made_RD[order.argsort()].unflatten(0, weights_TK.shape)
    return (made_TKD * weights_TK.unsqueeze(-1)).sum(1).to(made_RD.dtype)


@torch.no_grad()
def _try(model: nn.Module, sample: Batch, found: Mapping[str, Any], size: int) -> None:
    """Compare what all experts make of the tokens of ``sample`` with what ranks would make of them."""
    errors: dict[str, float] = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            played = _played(module, *_named(tuple(inspect.signature(module.forward).parameters), args, kwargs), size)
            apart = math.inf if played is None else float((played - output).abs().max())
            error = apart / max(float(output.abs().max()), SMALLEST)
            if not error <= errors.setdefault(name, 0.0):  # also what is not a number
                errors[name] = error

        return hook

    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(compare(name), with_kwargs=True) for name, module in found.items()]
    try:
        logits_of(model.eval(), sample.inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    for name, error in errors.items():
        if not error <= NEAR:
            raise PlanError(
                f"layout.expert={size}: {name}, a {type(found[name]).__name__}, makes something else of tokens that "
                f"come to its experts one by one (by {error:.1g} of its largest output). Use expert=1"
            )


def _played(module: Any, hidden_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor, size: int) -> Tensor | None:
    """The output of a module of experts, made by ``size`` ranks that each have some of them; None if it cannot be."""
    if hidden_TD.ndim != 2 or int(chosen_TK.max()) >= module.num_experts:
        return None
    order = chosen_TK.flatten().argsort(stable=True)
    rows_RD, chosen_R = hidden_TD[order // chosen_TK.shape[1]], chosen_TK.flatten()[order]
    own, made = module.num_experts // size, []
    for index in range(size):
        part = copy.copy(module)
        part.num_experts = own
        part._parameters = {key: value.chunk(size)[index] for key, value in module.named_parameters(recurse=False)}
        mine = chosen_R // own == index
        if mine.any():
            made.append(_one_by_one(part.forward, rows_RD[mine], chosen_R[mine] - index * own))
    return _weighted(torch.cat(made), order, weights_TK)
