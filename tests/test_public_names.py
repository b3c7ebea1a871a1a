"""The names other people's code may rely on. A change here is a change for them: it belongs into CHANGELOG.md."""

import importlib
import inspect

import pytest

PUBLIC = {
    "paceline": {"Config", "PacelineError", "StepEvent", "Trainer", "__version__", "read", "run"},
    "paceline.errors": {
        "PacelineError",
        "ConfigError",
        "PlanError",
        "ModelError",
        "DataError",
        "CheckpointError",
        "LinkError",
        "WorkerError",
        "TrainError",
        "NonFiniteError",
        "NonFiniteElsewhere",
        "MissingExtraError",
    },
    "paceline.registry": {
        "Table",
        "unknown",
        "AVERAGES",
        "OBJECTIVES",
        "OPTIMIZERS",
        "SCHEDULES",
        "SYNCS",
        "SYNC_CHOICES",
        "REDUCERS",
        "SERVERS",
        "AGGREGATES",
    },
}


def names_of(module_name: str) -> set[str]:
    """``__all__``, or else what the module itself defines under a public name."""
    module = importlib.import_module(module_name)
    if hasattr(module, "__all__"):
        return set(module.__all__)
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", module_name) == module_name
    }


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_as_promised(module: str) -> None:
    assert names_of(module) == PUBLIC[module]


def test_every_public_name_of_the_package_is_there() -> None:
    package = importlib.import_module("paceline")
    assert [name for name in package.__all__ if not hasattr(package, name)] == []


def test_every_error_is_one_that_the_command_line_explains() -> None:
    errors = importlib.import_module("paceline.errors")
    classes = [getattr(errors, name) for name in PUBLIC["paceline.errors"]]
    assert all(issubclass(cls, errors.PacelineError) and cls.exit_status != 0 for cls in classes)
