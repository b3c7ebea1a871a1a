"""Gradient accumulation: the micro-batches of a step, one after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from paceline.models.chance import stream_seed
from paceline.objectives.base import Batch, Objective, logits_of
from paceline.objectives.vocabulary import gather_logits
from paceline.parallel.dropout import Dropout


class Accumulate:
    """Runs micro-batches forward and backward so that their gradients add up to that of the whole batch."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        seed: int,
        device: torch.device,
        dropout: Dropout | None = None,
    ) -> None:
        self._model = model
        self._objective = objective
        self._seed = seed
        self._device = device
        self._dropout = dropout

    def run(self, batches: Sequence[Batch], *, step: int, scale: float, expect: Callable[[bool], None]) -> float:
        """Add ``scale`` times the gradient of the summed loss to the parameters' gradients; returns the summed loss.

        ``expect`` is told before each backward pass whether it is the last of the step: then gradients are final.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for i, batch in enumerate(batches):
            with random_stream(self._device, self._seed, step, batch.sequences[0]):
                expect(i == len(batches) - 1)
                with self._dropout.drawing(step, batch) if self._dropout else nullcontext():
                    loss = self._objective.loss(self._model, replace(batch.to(self._device), scale=scale))
                (loss * scale).backward()
            total += loss.detach()
        return float(total.item())

    def product(self, batches: Sequence[Batch], vectors: Mapping[str, Tensor], *, step: int, scale: float) -> float:
        """As ``run``, but what is added is the derivative of these gradients along ``vectors``, by parameter name.

        The model computes in the parameters' own dtype, with code that can be differentiated twice.
        """
        parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch in batches:
            with random_stream(self._device, self._seed, step, batch.sequences[0]), sdpa_kernel(SDPBackend.MATH):
                with self._dropout.drawing(step, batch) if self._dropout else nullcontext():
                    loss = self._objective.loss(self._model, batch.to(self._device))
                gradients = torch.autograd.grad(
                    loss * scale, list(parameters.values()), create_graph=True, allow_unused=True
                )
                slopes = [
                    (g * vectors[name]).sum() for name, g in zip(parameters, gradients, strict=True) if g is not None
                ]
                if slopes:
                    torch.stack(slopes).sum().backward(inputs=list(parameters.values()))
            total += loss.detach()
        return float(total.item())

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """The summed loss of a batch."""
        return float(self._objective.loss(self._model, batch.to(self._device)))

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """From ids (B, S) to logits (B, S, V), of the whole vocabulary."""
        return gather_logits(self._model, logits_of(self._model, {"input_ids": ids, "use_cache": False}))


@contextmanager
def random_stream(device: torch.device, *parts: object) -> Iterator[None]:
    """Draw random numbers from a stream that is a function of ``parts`` alone; the caller's goes on as if none were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(stream_seed(*parts))
        yield
