"""L-BFGS (Liu & Nocedal 1989), torch's, with a line search by the strong Wolfe conditions; for small models.

It looks at the loss of the step's batch again and again, and knows one rate for all parameters. What it keeps is as
large as the parameters some twenty times over: the newest changes of parameters and gradient.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paceline.config import Count, Positive
from paceline.errors import PlanError
from paceline.optim.base import OptimizerConfig, Passes, Sees, Shapes
from paceline.parallel.full import FullTensors

SCALARS = ("n_iter", "func_evals", "t", "H_diag", "prev_loss")
"""What torch keeps besides vectors and one product for each change, under its names."""


class LBFGS(OptimizerConfig):
    """Quasi-Newton steps with a line search; small models, batches that hardly change, replicas only."""

    lr: Positive = 1.0
    """The first length that the line search tries; the schedule multiplies it by a factor."""
    iterations: Count = 4
    """Changes of direction in one step, on one batch."""
    evaluations: Count = 25
    """The most evaluations of loss and gradient in one step."""
    history: Count = 10
    """Changes that are kept."""

    sees: ClassVar[Sees] = "loss"
    source: ClassVar[str] = "Liu & Nocedal 1989, Math. Programming 45"
    code: ClassVar[str] = "torch.optim.LBFGS"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """Direction, gradient, and two for each change that is kept, when all are there."""
        return (2 + 2 * self.history) * value_bytes * sum(math.prod(shape) for shape in shapes.values())

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named parameters."""
        if not parameters:
            raise PlanError("the model has nothing to train: no parameter of it has requires_grad")
        return _LBFGS(self, parameters)


class _LBFGS(torch.optim.LBFGS):
    """Keeps what torch keeps in flat vectors as views of these for each parameter, so that it can be saved by name."""

    def __init__(self, options: LBFGS, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(
            list(parameters.values()),
            lr=options.lr,
            max_iter=options.iterations,
            max_eval=options.evaluations,
            history_size=options.history,
            line_search_fn="strong_wolfe",
        )
        self._kept: dict[str, Any] = {}
        self._shown: Tensor | None = None

    def search(self, passes: Passes) -> None:
        """One step of torch's, whose first evaluation is the one that there is already."""
        first = iter([passes.loss])

        def closure() -> float:
            loss = next(first, None)
            return passes.gradient() if loss is None else loss

        parameters = self.param_groups[0]["params"]
        if self.state and self.state[parameters[0]].get("gradient") is not self._shown:
            self._kept = self._joined()  # it was restored
        self.state.clear()
        self.state[parameters[0]] = self._kept
        super().step(closure)  # type: ignore[no-untyped-call]
        self._kept = self.state[parameters[0]]
        self.state.clear()
        self._show()

    def _show(self) -> None:
        parameters, kept = self.param_groups[0]["params"], self._kept
        if kept.get("prev_flat_grad") is None:
            return
        vectors = {"direction": kept["d"], "gradient": kept["prev_flat_grad"]}
        for i, (change, step) in enumerate(zip(kept["old_dirs"], kept["old_stps"], strict=True)):
            vectors |= {f"gradient_change_{i}": change, f"step_{i}": step}
        sizes = [parameter.numel() for parameter in parameters]
        for key, vector in vectors.items():
            for parameter, part in zip(parameters, vector.split(sizes), strict=True):
                self.state[parameter][key] = part.view(parameter.shape)
        scalars = {key: kept[key] for key in SCALARS} | {f"ro_{i}": product for i, product in enumerate(kept["ro"])}
        for key, value in scalars.items():
            self.state[parameters[0]][key] = torch.tensor(float(value), dtype=torch.float64)
        self._shown = self.state[parameters[0]]["gradient"]

    def _joined(self) -> dict[str, Any]:
        parameters = self.param_groups[0]["params"]
        first = self.state[parameters[0]]
        scalars = {key: float(value) for key, value in first.items() if not value.ndim}
        vectors = {
            key: torch.cat([self.state[parameter][key].flatten() for parameter in parameters])
            for key in first
            if key not in scalars
        }
        changes = range(sum(key.startswith("ro_") for key in scalars))
        like = vectors["gradient"]
        return {
            "n_iter": int(scalars["n_iter"]),
            "func_evals": int(scalars["func_evals"]),
            "t": scalars["t"],
            "H_diag": like.new_tensor(scalars["H_diag"]),
            "prev_loss": scalars["prev_loss"],
            "ro": [like.new_tensor(scalars[f"ro_{i}"]) for i in changes],
            "d": vectors["direction"],
            "prev_flat_grad": like,
            "old_dirs": [vectors[f"gradient_change_{i}"] for i in changes],
            "old_stps": [vectors[f"step_{i}"] for i in changes],
        }
