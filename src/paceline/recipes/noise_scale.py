"""``paceline noise-scale``: how many sequences a batch can have before more of them help little."""

import math
import signal
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paceline.comm.device import claim as claim_device
from paceline.comm.ranks import Coordinates
from paceline.comm.world import Rendezvous, join
from paceline.config import Config
from paceline.errors import ConfigError, PlanError
from paceline.launch import torchrun
from paceline.launch.local import LocalRun
from paceline.plan.layout import Grid
from paceline.plan.run import plan_run
from paceline.recipes.prepare import prepare_in_child
from paceline.recipes.train import places
from paceline.train.assemble import assemble
from paceline.train.noise import Noise, Norms, estimate, measure
from paceline.train.policy import StopRequest
from paceline.train.settle import settle
from paceline.train.trainer import Loop
from paceline.workers.process import Line

Say = Callable[[str], None]

FAR = 4.0
"""So many times the noise scale, or such a part of it, is far from it."""


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """What was found at a step."""

    step: int
    batches: int
    sequences: int
    """Of a batch."""
    sequence_tokens: int
    noise: Noise

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON; what is not finite is None."""
        found = {name: value if math.isfinite(value) else None for name, value in asdict(self.noise).items()}
        scale = found["scale"]
        tokens = {"scale_tokens": None if scale is None else scale * self.sequence_tokens}
        counts = {name: getattr(self, name) for name in ("step", "batches", "sequences", "sequence_tokens")}
        return {**counts, **found, **tokens}

    def words(self) -> str:
        """The estimate, and what it means."""
        scale, error = self.noise.scale, self.noise.error
        at = f"at step {self.step}, over {self.batches} batches of {self.sequences} sequences"
        if not math.isfinite(scale):
            return f"noise scale: not found {at}, for the noise hides the gradient. Use more --batches"
        within = f"{error:,.1f}" if math.isfinite(error) else "unknown"
        tokens = f"{scale * self.sequence_tokens:,.0f} tokens"
        return f"noise scale {scale:,.1f} sequences ({tokens}), standard error {within}, {at}\n{self._meaning()}"

    def _meaning(self) -> str:
        now, scale = self.sequences, self.noise.scale
        if now * FAR < scale:
            return f"batch.sequences={now} is far below it: twice as many would take about half as many steps"
        if now > FAR * scale:
            return f"batch.sequences={now} is far above it: half as many would take about as many steps"
        return f"batch.sequences={now} is near it: more would save steps, but take more sequences in all"


def noise_scale(config: Config, *, batches: int = 8, debug: bool = False, say: Say = print) -> NoiseScale:
    """Measure at the newest checkpoint of the config's run, or at its start; nothing is learned or written.

    The batch is that of ``batch.sequences``, also while it grows. Raises what training raises before its first step,
    ``ConfigError`` for fewer than 3 batches, and ``PlanError`` under torchrun.
    """
    if batches < 3:
        raise ConfigError(f"--batches={batches}: expected 3 or more, for the standard error leaves out one at a time")
    if config.model is None:
        raise ConfigError("model is missing; set model.config, model.preset or model.path")
    if torchrun.started_by_torchrun():
        raise PlanError("noise-scale starts its ranks itself: run it without torchrun, on one machine")
    config = settle(config)
    if not config.keeps_equal:
        raise PlanError(
            f"{config.learning_alone}: replicas that learn alone are at places of their own, each with another "
            "gradient. Measure with sync=all_reduce"
        )
    if not config.is_exact:
        raise PlanError("sync.reducer: a gradient that leaves something out has noise of its own. Measure with mean")
    if config.in_rounds:
        raise PlanError("sync=federated: each client has data and gradients of its own. Measure with sync=all_reduce")
    full = config.batch.model_copy(update={"warmup": None})
    checkpoint = config.checkpoint.model_copy(update={"resume": "auto"})
    config = config.model_copy(update={"batch": full, "checkpoint": checkpoint})
    grid, _ = plan_run(config)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="paceline-noise-scale-") as folder:
        logs = Path(folder) / "logs"
        prepare_in_child(config, logs / "prepare.log", say=say, debug=debug)
        local = LocalRun(_NoiseMain(config, batches), places(config, grid.ranks), port=0, logs=logs, debug=debug)
        try:
            for rank, message in local.messages():
                if rank == 0 and message["kind"] == "norms":
                    found = message
        finally:
            local.kill()
    return NoiseScale(
        step=found["step"],
        batches=batches,
        sequences=config.batch.sequences,
        sequence_tokens=config.batch.sequence_tokens,
        noise=estimate(Norms(**found["norms"])),
    )


@dataclass(frozen=True)
class _NoiseMain:
    """What each local rank runs. A class, so that a spawned process can receive it."""

    config: Config
    batches: int

    def __call__(self, coordinates: Coordinates, rendezvous: Rendezvous, line: Line) -> None:
        stop_request = StopRequest()
        stop_request.listen(signal.SIGTERM)
        device = claim_device(coordinates)
        with (
            join(coordinates, device, rendezvous, Grid.of(self.config.layout)) as world,
            Loop(assemble(self.config, world, saves=False, say=lambda _: None), stop_request=stop_request) as loop,
        ):
            norms = measure(loop, self.batches)
            if coordinates.is_leader:
                line.send("norms", step=loop.step, norms=asdict(norms))
