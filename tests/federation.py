"""A federated run by its definition: one process, one client after the other, in fp64, from the papers.

The product gives the model, the rows of each visit and their loss; all rules are written out here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loops import config
from paceline.config import Config
from paceline.data.client_loader import ClientLoader
from paceline.data.rounds import Rounds
from paceline.plan.run import plan_batches
from paceline.verify.double import in_double
from paceline.verify.subject import Subject

Weights = dict[str, Tensor]
CLIENTS = 5
LR = 0.3


def federated(*, folder: str = "unused", replicas: int = 1, layout: Any = None, **options: Any) -> Config:
    """Five clients, three a round, two local steps of plain SGD each."""
    other = {key: options.pop(key) for key in ("optimizer", "train", "schedule", "checkpoint") if key in options}
    options = {"clients_per_round": 3, **({} if "epochs" in options else {"local_steps": 2}), **options}
    clients = {"source": "unused", "clients": {"by": "dirichlet", "count": options.pop("count", CLIENTS)}}
    return config(
        {"name": "federated", **options},
        folder=folder,
        replicas=replicas,
        layout=layout or {},
        data=clients,
        batch={"sequences": 3},
        **{"train": {"steps": 2}, **other},
    )


def plus(one: Weights, other: Weights, factor: float = 1.0) -> Weights:
    """one + factor x other."""
    return {name: value + factor * other[name] for name, value in one.items()}


def times(weights: Weights, factor: float) -> Weights:
    """All of them times a number."""
    return {name: factor * value for name, value in weights.items()}


def square(weights: Weights) -> float:
    """Squared norm over all tensors together."""
    return sum(float((value**2).sum()) for value in weights.values())


class Federation:
    """What a config says, step by step."""

    def __init__(self, run: Config) -> None:
        self.run, self.sync = run, run.sync
        material = Subject.of(run, full=True).material(torch.float64)
        self.model, self._objective = material.model, material.objective
        assert material.clients is not None
        rounds = Rounds(material.clients.lengths, run.sync.rules(run.batch.sequences), run.seed)
        batch = plan_batches(run).full
        self.loader = ClientLoader(material.train, material.clients, rounds, batch, replica=0, replicas=1, rank=0)
        self.clients = len(material.clients)
        names = {id(p): name for name, p in self.model.named_parameters()}
        self.start = {names[id(p)]: p.detach().clone() for p in self.model.parameters()}

    def gradient(self, weights: Weights, rows: Any, number: int) -> tuple[Weights, float, int]:
        """Of the summed loss of the rows, with that and the number of targets."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        self.model.zero_grad()
        loss_sum, targets = 0.0, 0
        for micro in rows:
            batch = self._objective.batch(micro, seed=self.run.seed, step=number)
            loss = self._objective.loss(self.model, batch)
            loss.backward()
            loss_sum, targets = loss_sum + loss.item(), targets + batch.count
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}, loss_sum, targets

    def learn(
        self,
        server: Callable[[int, Weights, list[Any]], Weights],
        *,
        local: Any = None,
        leave: Any = None,
        momentum: float = 0.0,
        keep: bool = False,
    ) -> Any:
        """Losses of all rounds, and the weights after the last.

        ``server``: from the round, its weights and what its clients told to the next weights. ``local`` adds to a
        client's gradient, ``leave`` is called when it is done. ``momentum`` of their SGD, which they ``keep`` from
        round to round or not.
        """
        buffers: dict[int, Weights] = {}
        history, losses = [self.start], []
        for number in range(1, self.run.train.steps + 1):
            told, total, count = [], 0.0, 0
            for visit, steps in self.loader.visits(number):
                begun = history[-1 - visit.staleness] if visit.staleness < len(history) else history[0]
                own, learned, first = dict(begun), 0, None
                buffer = buffers.get(visit.client) if keep else None
                for local_step, rows in enumerate(steps, 1):
                    gradient, loss, targets = self.gradient(own, rows, local_step)
                    gradient = times(gradient, 1.0 / max(1, targets))
                    if local is not None:
                        gradient = local(visit, gradient, own, begun)
                    buffer = gradient if buffer is None else plus(gradient, buffer, momentum)
                    own = plus(own, buffer if momentum else gradient, -LR)
                    total, count, learned = total + loss, count + targets, learned + targets
                    first = loss / targets if first is None and targets else first
                update = plus(own, begun, -1.0)
                buffers[visit.client] = buffer
                if leave is not None:
                    leave(visit, update)
                told.append((visit, update, learned, first))
            losses.append(total / count)
            history.append(server(number, history[-1], told))
        return losses, history[-1]


def mean_of(told: list[Any], weigh: Callable[[Any], float]) -> Weights:
    """The weighted mean of updates."""
    total = sum(weigh(one) for one in told)
    result = times(told[0][1], 0.0)
    for one in told:
        result = plus(result, one[1], weigh(one) / total)
    return result


def told_in_double(run: Config, *args: Any, **kwargs: Any) -> Any:
    """``Federation.learn`` with llama's fp32 parts in fp64, as the product's runs have them."""
    with in_double():
        return Federation(run).learn(*args, **kwargs)
