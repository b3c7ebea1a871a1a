"""The two halves of a backward pass: the gradients of what a stage received, and later those of its weights.

A weight enters the graph at borders: nodes that also lead to what was received. The first half passes through them, and
the gradients that arrive there are kept; the second goes on from there to the weights. Zero-bubble schedules do other
work in between (Qi et al. 2023, arXiv 2401.10241).

Torch has this too, but loses gradients where a stage hands on something that does not depend on what it received, like
the position bias of T5, and counts some twice where weights share a part of their borders.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Gradients = tuple[Tensor | None, ...]


@dataclass(eq=False)
class _Group:
    """Weights that share borders."""

    weights: list[nn.Parameter] = field(default_factory=list)
    borders: set[Node] = field(default_factory=set)


@dataclass(eq=False)
class WeightHalf:
    """What is left of a backward pass after its first half."""

    groups: list[_Group]
    arrived: dict[Node, Gradients]
    apart: list[tuple[Tensor, Tensor]]
    """Outputs that do not depend on what was received, and their gradients."""
    weights: list[nn.Parameter]

    def run(self) -> None:
        """Add the gradients of the weights to their ``grad``."""
        for group in self.groups:
            self._run_group(group)
        if self.apart:
            outputs, grads = zip(*self.apart, strict=True)
            _add(self.weights, torch.autograd.grad(outputs, self.weights, grads, retain_graph=True, allow_unused=True))

    def _run_group(self, group: _Group) -> None:
        borders = [border for border in group.borders if border in self.arrived]
        edges = [(GradientEdge(b, i), g) for b in borders for i, g in enumerate(self.arrived[b]) if g is not None]
        if not edges:
            return
        # A border may lead to another one of the group, at which its contribution has already arrived.
        fixed = [b.register_prehook(_Fixed(self.arrived[b])) for b in borders] if len(borders) > 1 else []
        try:
            outputs, grads = zip(*edges, strict=True)
            found = torch.autograd.grad(outputs, group.weights, grads, retain_graph=True, allow_unused=True)
        finally:
            for handle in fixed:
                handle.remove()
        _add(group.weights, found)


def input_half(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    received: Sequence[Tensor],
    weights: Iterable[nn.Parameter],
) -> tuple[Gradients, WeightHalf]:
    """The gradient of each tensor in ``received`` (None where there is none), and what is left to do.

    ``grads`` are those of ``outputs``; None for that of a loss.
    """
    given = [
        (o, torch.ones_like(o) if g is None else g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad
    ]
    above = _edges_upward([get_gradient_edge(output).node for output, _ in given])
    wanted = [tensor for tensor in received if tensor.requires_grad]
    passed = _upward([get_gradient_edge(tensor).node for tensor in wanted], above)
    learning = [weight for weight in weights if weight.requires_grad]
    groups = _groups(learning, above, passed)
    through = [(o, g) for o, g in given if get_gradient_edge(o).node in passed]
    arrived: dict[Node, Gradients] = {}
    handles = [border.register_prehook(_Keep(arrived, border)) for group in groups for border in group.borders]
    try:
        found: Gradients = (None,) * len(wanted)
        if through and wanted:
            roots, root_grads = zip(*through, strict=True)
            found = torch.autograd.grad(roots, wanted, root_grads, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    by_tensor = {id(tensor): grad for tensor, grad in zip(wanted, found, strict=True)}
    apart = [(o, g) for o, g in given if get_gradient_edge(o).node not in passed]
    return tuple(by_tensor.get(id(tensor)) for tensor in received), WeightHalf(groups, arrived, apart, learning)


class _Keep:
    """Keeps the gradients that arrive at a border."""

    def __init__(self, arrived: dict[Node, Gradients], border: Node) -> None:
        self._arrived = arrived
        self._border = border

    def __call__(self, grads: Gradients) -> None:
        self._arrived[self._border] = grads


class _Fixed:
    """Puts the gradients that had arrived in place of what arrives now."""

    def __init__(self, grads: Gradients) -> None:
        self._grads = grads

    def __call__(self, _: Gradients) -> Gradients:
        return self._grads


def _edges_upward(roots: Iterable[Node]) -> dict[Node, list[Node]]:
    """Of each node of a graph, those whose gradients flow into it."""
    above: dict[Node, list[Node]] = defaultdict(list)
    seen, todo = set(roots), list(roots)
    while todo:
        node = todo.pop()
        for below, _ in node.next_functions:
            if below is not None:
                above[below].append(node)
                if below not in seen:
                    seen.add(below)
                    todo.append(below)
    return above


def _upward(nodes: Iterable[Node], above: dict[Node, list[Node]]) -> set[Node]:
    """These nodes, and all whose gradients flow into them."""
    seen = set(nodes)
    todo = list(seen)
    while todo:
        for node in above.get(todo.pop(), ()):
            if node not in seen:
                seen.add(node)
                todo.append(node)
    return seen


def _borders(weight: nn.Parameter, above: dict[Node, list[Node]], passed: set[Node]) -> set[Node]:
    borders: set[Node] = set()
    seen: set[Node] = set()
    todo = [get_gradient_edge(weight).node]
    while todo:
        for node in above.get(todo.pop(), ()):
            if node in passed:
                borders.add(node)
            elif node not in seen:
                seen.add(node)
                todo.append(node)
    return borders


def _groups(weights: Sequence[nn.Parameter], above: dict[Node, list[Node]], passed: set[Node]) -> list[_Group]:
    """Weights that share no border are apart: then no gradient is computed on the way from one to the other."""
    group_of: dict[Node, _Group] = {}
    for weight in weights:
        merged = _Group([weight], _borders(weight, above, passed))
        for other in {id(group): group for b in merged.borders if (group := group_of.get(b))}.values():
            merged.weights += other.weights
            merged.borders |= other.borders
        group_of.update(dict.fromkeys(merged.borders, merged))
    return list({id(group): group for group in group_of.values()}.values())


def _add(weights: Sequence[nn.Parameter], grads: Gradients) -> None:
    for weight, grad in zip(weights, grads, strict=True):
        if grad is not None:
            weight.grad = grad if weight.grad is None else weight.grad + grad
