"""``paceline seeds``: a config trained once for each of some seeds, to tell settings apart from chance."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paceline.config import Config
from paceline.errors import ConfigError, PlanError
from paceline.launch import torchrun
from paceline.recipes.train import run
from paceline.track.folder import read_run
from paceline.train.settle import settle

Say = Callable[[str], None]

COLUMNS = {"loss": "last loss", "held_out_loss": "held-out loss", "bits_per_byte": "bits per byte"}

# fmt: off
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)
# fmt: on
"""Quantiles of Student's t for 95 % between both ends, for 1 to 30 degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class Seed:
    """What one run came to; None for what it has not measured."""

    seed: int
    loss: float | None
    held_out_loss: float | None
    bits_per_byte: float | None


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of one number over the seeds."""

    mean: float
    deviation: float
    """Sample standard deviation."""
    half_width: float
    """Of the 95 % interval of the mean."""


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """All runs."""

    rows: Sequence[Seed]

    def spreads(self) -> dict[str, Spread]:
        """Of every number that all runs have."""
        found = {name: [getattr(row, name) for row in self.rows] for name in COLUMNS}
        return {name: spread(values) for name, values in found.items() if None not in values}

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "seeds": [asdict(row) for row in self.rows],
            **{name: asdict(found) for name, found in self.spreads().items()},
        }

    def text(self) -> str:
        """The table."""
        lines = [_line("seed", COLUMNS.values())]
        lines += [_line(str(row.seed), (_number(getattr(row, name)) for name in COLUMNS)) for row in self.rows]
        spreads = self.spreads()
        for words, key in (("mean", "mean"), ("deviation", "deviation"), ("95 % +-", "half_width")):
            lines.append(_line(words, (_number(getattr(spreads.get(name), key, None)) for name in COLUMNS)))
        return "\n".join(lines)


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation, and the 95 % interval of the mean by Student's t, of two values or more."""
    deviation = statistics.stdev(values)
    half_width = t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return Spread(mean=statistics.fmean(values), deviation=deviation, half_width=half_width)


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile; above the table by the expansion of Cornish and Fisher, which is right to 4 digits there."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def seeds(config: Config, chosen: Sequence[int], *, debug: bool = False, say: Say = print) -> Seeds:
    """Train the config with each seed, in ``train.output/seed-N``; finished ones are not trained again.

    ``ConfigError`` for fewer than two seeds, one that stands twice, or a finished run of another config.
    """
    if len(chosen) < 2 or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise ConfigError(f"--seeds={','.join(map(str, chosen))}: expected two or more different numbers of 0 or more")
    if torchrun.started_by_torchrun():
        raise PlanError("seeds starts its runs itself: run it without torchrun, on one machine")
    config = settle(config)
    rows = []
    for seed in chosen:
        output = str(Path(config.train.output) / f"seed-{seed}")
        train = config.train.model_copy(update={"output": output})
        own = config.model_copy(update={"seed": seed, "train": train})
        if _is_done(own):
            say(f"seed {seed}: trained already, {output}")
        else:
            say(f"seed {seed}: {output}")
            result = run(own, debug=debug, say=say)
            if result is None or not result.is_done:
                raise PlanError(f"seed {seed} was stopped before its end; the same command goes on")
        rows.append(_row(output, seed))
    return Seeds(rows=rows)


def _is_done(config: Config) -> bool:
    folder = Path(config.train.output)
    if not (folder / "config.yaml").is_file():
        return False
    known = read_run(folder)
    if not known.events or known.events[-1]["kind"] != "done":
        return False
    if known.config != config.tree():
        raise ConfigError(f"{folder} holds a finished run of another config; choose another train.output")
    return True


def _row(output: str, seed: int) -> Seed:
    """From the run's own records, at the step that its weights are of."""
    known = read_run(Path(output))
    step = known.events[-1]["step"]
    held_out, bits = dict(known.held_out("loss")), dict(known.held_out("bits_per_byte"))
    losses = dict(known.points(known.column("loss")))
    return Seed(seed=seed, loss=losses.get(step), held_out_loss=held_out.get(step), bits_per_byte=bits.get(step))


def _line(first: str, others: Any) -> str:
    return f"{first:<10}" + "".join(f"  {word:>13}" for word in others)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
