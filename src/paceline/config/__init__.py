"""The config tree: what a run is made of, read from YAML, with overrides from the command line.

Every value a user can set stands here or, for a strategy chosen by name (objective, optimizer, schedule, sync), beside
the class it configures. Nothing here is derived: what follows from other values is computed in ``plan``. The problems
of a config are collected and raised once, each with its path and its value.
"""

from paceline.config.files import override, read, read_tree, schema
from paceline.config.options import (
    STRATEGIES,
    AtLeastOne,
    ChosenFrom,
    Count,
    Fraction,
    Natural,
    NonNegative,
    Options,
    Positive,
    Share,
    Text,
    choose,
    strategy_name,
)
from paceline.config.run import Config
from paceline.config.sections import (
    BatchConfig,
    BatchWarmup,
    CheckpointConfig,
    ClientsConfig,
    DataConfig,
    EarlyStopConfig,
    EvaluateConfig,
    LayoutConfig,
    LossScaleConfig,
    ModelConfig,
    PerturbConfig,
    RegularisationConfig,
    SourceConfig,
    SpikesConfig,
    TrackConfig,
    TrainConfig,
)
from paceline.config.sync import SyncOptions

__all__ = [
    "STRATEGIES",
    "AtLeastOne",
    "BatchConfig",
    "BatchWarmup",
    "CheckpointConfig",
    "ChosenFrom",
    "ClientsConfig",
    "Config",
    "Count",
    "DataConfig",
    "EarlyStopConfig",
    "EvaluateConfig",
    "Fraction",
    "LayoutConfig",
    "LossScaleConfig",
    "ModelConfig",
    "Natural",
    "NonNegative",
    "Options",
    "PerturbConfig",
    "Positive",
    "RegularisationConfig",
    "Share",
    "SourceConfig",
    "SpikesConfig",
    "SyncOptions",
    "Text",
    "TrackConfig",
    "TrainConfig",
    "choose",
    "override",
    "read",
    "read_tree",
    "schema",
    "strategy_name",
]
