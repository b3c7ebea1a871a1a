"""Training from Python: the same run as the command line's, in the caller's own loop."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from paceline.comm.device import claim
from paceline.comm.ranks import ALONE
from paceline.comm.world import join
from paceline.config import Config, read
from paceline.errors import PlanError
from paceline.evaluate.held_out import Evaluation
from paceline.launch import torchrun
from paceline.objectives.base import Objective
from paceline.plan.layout import Grid
from paceline.recipes import folder as run_folder
from paceline.train.assemble import assemble
from paceline.train.hooks import Hook, StepEvent
from paceline.train.records import open_records
from paceline.train.settle import settle
from paceline.train.trainer import Loop

Module = nn.Module | Callable[[], nn.Module]


class Trainer:
    """One rank's training, step by step, in the caller's process.

    ``config`` is a Config, a map, or the path of a YAML file. ``model`` takes the place of the config's: an nn.Module
    (or a function that makes one) whose forward takes ``input_ids`` (B, S) and gives logits (B, S, V). ``objective``
    likewise. Alone the process is the only replica; under torchrun it is the rank that torchrun made it. Raises
    ``PacelineError`` subclasses with a message for the user.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | Path,
        *,
        model: Module | None = None,
        objective: Objective | None = None,
        hooks: tuple[Hook, ...] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        self.config = as_config(config)
        self._stack = ExitStack()
        try:
            self._loop = self._enter(model, objective, hooks, say)
        except BaseException:
            self._stack.close()
            raise

    @property
    def model(self) -> nn.Module:
        """The module that is trained."""
        return self._loop.parts.built.model

    @property
    def step(self) -> int:
        """Steps done, those before a resume included."""
        return self._loop.step

    def steps(self) -> Iterator[StepEvent]:
        """Train; yields each step when it is done, up to ``train.steps``."""
        return self._loop.steps()

    def evaluate(self) -> Evaluation:
        """Measure the held-out part now."""
        return self._loop.evaluate()

    def save(self) -> None:
        """Write a checkpoint of this step in the background."""
        self._loop.save()

    def close(self) -> None:
        """Finish what runs in the background and leave the other ranks."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; an error of the loop is told to what is closed, and not hidden by a later one."""
        self._stack.__exit__(kind, error, trace)

    def _enter(
        self, model: Module | None, objective: Objective | None, hooks: tuple[Hook, ...], say: Callable[[str], None]
    ) -> Loop:
        config, coordinates, rendezvous = self.config, ALONE, None
        grid = Grid.of(config.layout)
        if torchrun.started_by_torchrun():
            coordinates = torchrun.coordinates(config.all_replicas, grid.ranks)
            rendezvous = self._stack.enter_context(torchrun.rendezvous(coordinates))
        elif (world_size := config.all_replicas * grid.ranks) > 1:
            raise PlanError(
                f"replicas={config.all_replicas} x {grid.ranks} rank(s), but a Trainer is one process: start the "
                f"script with `torchrun --nproc-per-node {world_size}`, or call paceline.run, which starts the ranks"
            )
        if coordinates.is_leader:
            self._stack.enter_context(run_folder.claim(config.train.output))
        world = self._stack.enter_context(join(coordinates, claim(coordinates), rendezvous, grid, config.group_sizes))
        module = model() if callable(model) and not isinstance(model, nn.Module) else model
        config = self.config = settle(config, module, say=say if coordinates.is_leader else lambda _: None)
        parts = assemble(config, world, module=module, objective=objective, say=say)
        loop = self._stack.enter_context(Loop(parts, hooks=hooks))
        if coordinates.is_leader:
            open_records(loop)
        return loop


def as_config(config: Config | Mapping[str, Any] | str | Path) -> Config:
    """A Config from whatever a caller has."""
    if isinstance(config, Config):
        return config
    return Config.parse(config) if isinstance(config, Mapping) else read(config)
