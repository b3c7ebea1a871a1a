"""Names a user may write in a config, and where the class behind each name lives.

A strategy is one file with one frozen config class and one runtime class, and one line in a table here. The value is
``module:ConfigClass``; it is imported when the name is used, so that a table costs nothing to read. The config class
names its runtime class by a ``build`` method. Conformance tests read these tables: a new line is tested without new
test code.
"""

import difflib
import importlib
from collections.abc import Iterator
from typing import Any

from paceline.errors import ConfigError


class Table:
    """A literal map from a user's word to a lazily imported config class."""

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def target(self, name: str) -> str:
        """Where the config class called ``name`` lives, as ``module:Class``."""
        return self._entries[name]

    def load(self, name: str) -> type[Any]:
        """Import and return the config class called ``name``; ``ConfigError`` if there is none."""
        if name not in self._entries:
            raise ConfigError(f"{self.kind}={name!r}: {unknown(name, self._entries)}")
        module, _, attribute = self._entries[name].partition(":")
        loaded: type[Any] = getattr(importlib.import_module(module), attribute)
        return loaded


def unknown(name: str, known: Iterator[str] | dict[str, Any] | list[str]) -> str:
    """Say that ``name`` is not known, with the nearest known name if one is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}."
    return f"unknown name, {hint}"


OBJECTIVES = Table(
    "objective",
    {
        "next_token": "paceline.objectives.next_token:NextToken",
        "right_to_left": "paceline.objectives.right_to_left:RightToLeft",
        "masked": "paceline.objectives.masked:Masked",
        "seq2seq": "paceline.objectives.seq2seq:Seq2Seq",
    },
)

OPTIMIZERS = Table(
    "optimizer",
    {
        "adabelief": "paceline.optim.adabelief:AdaBelief",
        "adafactor": "paceline.optim.adafactor:Adafactor",
        "adagrad": "paceline.optim.adagrad:Adagrad",
        "adamw": "paceline.optim.adamw:AdamW",
        "adamw_8bit": "paceline.optim.adamw_8bit:AdamW8bit",
        "ftrl": "paceline.optim.ftrl:FTRL",
        "lamb": "paceline.optim.lamb:LAMB",
        "lbfgs": "paceline.optim.lbfgs:LBFGS",
        "lion": "paceline.optim.lion:Lion",
        "muon": "paceline.optim.muon:Muon",
        "newton_cg": "paceline.optim.newton_cg:NewtonCG",
        "onebit_adam": "paceline.optim.onebit_adam:OneBitAdam",
        "schedule_free_adamw": "paceline.optim.schedule_free_adamw:ScheduleFreeAdamW",
        "sgd": "paceline.optim.sgd:SGD",
        "shampoo": "paceline.optim.shampoo:Shampoo",
        "soap": "paceline.optim.soap:SOAP",
        "sophia": "paceline.optim.sophia:Sophia",
    },
)

SCHEDULES = Table(
    "schedule",
    {
        "constant": "paceline.optim.constant:Constant",
        "cosine": "paceline.optim.cosine:Cosine",
        "cosine_restarts": "paceline.optim.cosine_restarts:CosineRestarts",
        "cyclic": "paceline.optim.cyclic:Cyclic",
        "dynamic": "paceline.optim.dynamic:Dynamic",
        "exponential": "paceline.optim.exponential:Exponential",
        "inverse_sqrt": "paceline.optim.inverse_sqrt:InverseSqrt",
        "linear": "paceline.optim.linear:Linear",
        "one_cycle": "paceline.optim.one_cycle:OneCycle",
        "plateau": "paceline.optim.plateau:Plateau",
        "polynomial": "paceline.optim.polynomial:Polynomial",
        "step": "paceline.optim.step:Step",
        "wsd": "paceline.optim.wsd:WarmupStableDecay",
    },
)

AVERAGES = Table(
    "average",
    {
        "none": "paceline.optim.average:NoAverage",
        "ema": "paceline.optim.ema:Ema",
        "swa": "paceline.optim.swa:Swa",
    },
)

SYNCS = Table(
    "sync",
    {
        "all_reduce": "paceline.sync.all_reduce:AllReduce",
        "local_sgd": "paceline.sync.local_sgd:LocalSGD",
        "post_local_sgd": "paceline.sync.post_local_sgd:PostLocalSGD",
        "slowmo": "paceline.sync.slowmo:SlowMo",
        "diloco": "paceline.sync.diloco:DiLoCo",
        "streaming_diloco": "paceline.sync.streaming_diloco:StreamingDiLoCo",
        "gossip": "paceline.sync.gossip:Gossip",
        "partial": "paceline.sync.partial:Partial",
        "federated": "paceline.sync.federated:Federated",
        "parameter_server": "paceline.sync.parameter_server:ParameterServer",
        "async_local_sgd": "paceline.sync.async_local_sgd:AsyncLocalSGD",
    },
)

SYNC_CHOICES = Table("sync", {name: SYNCS.target(name) for name in SYNCS} | {"auto": "paceline.sync.auto:Auto"})
"""What a config may say: a strategy, or ``auto``, which becomes one (``train.settle``)."""

REDUCERS = Table(
    "sync.reducer",
    {
        "mean": "paceline.sync.reducers.mean:Mean",
        "bf16": "paceline.sync.reducers.bf16:BF16",
        "fp16": "paceline.sync.reducers.fp16:FP16",
        "int8": "paceline.sync.reducers.int8:Int8",
        "int4": "paceline.sync.reducers.int4:Int4",
        "sign": "paceline.sync.reducers.sign:Sign",
        "topk": "paceline.sync.reducers.topk:TopK",
        "randomk": "paceline.sync.reducers.randomk:RandomK",
        "dct_topk": "paceline.sync.reducers.dct_topk:DctTopK",
        "powersgd": "paceline.sync.reducers.powersgd:PowerSGD",
    },
)

SERVERS = Table(
    "sync.server",
    {
        "fedavg": "paceline.sync.servers.fedavg:FedAvg",
        "fedavgm": "paceline.sync.servers.fedavgm:FedAvgM",
        "fedadagrad": "paceline.sync.servers.fedadagrad:FedAdagrad",
        "fedadam": "paceline.sync.servers.fedadam:FedAdam",
        "fedyogi": "paceline.sync.servers.fedyogi:FedYogi",
    },
)

AGGREGATES = Table(
    "sync.aggregate",
    {
        "mean": "paceline.sync.aggregates.mean:Mean",
        "krum": "paceline.sync.aggregates.krum:Krum",
        "bulyan": "paceline.sync.aggregates.bulyan:Bulyan",
        "trimmed_mean": "paceline.sync.aggregates.trimmed_mean:TrimmedMean",
        "median": "paceline.sync.aggregates.median:Median",
        "geometric_median": "paceline.sync.aggregates.geometric_median:GeometricMedian",
        "centred_clipping": "paceline.sync.aggregates.centred_clipping:CentredClipping",
    },
)
