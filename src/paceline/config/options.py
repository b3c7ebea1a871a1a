"""Parts of a config, strategies that are chosen by name, and what is said of wrong values."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import core_schema

from paceline import registry
from paceline.errors import ConfigError


def not_bool(value: Any) -> Any:
    """A number, and not the 1 that ``true`` would be taken for."""
    if isinstance(value, bool):
        raise ValueError("expected a number, got a truth value")
    return value


Count = Annotated[int, Field(gt=0), BeforeValidator(not_bool)]
Natural = Annotated[int, Field(ge=0), BeforeValidator(not_bool)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(not_bool)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(not_bool)]
Fraction = Annotated[float, Field(ge=0, lt=1), BeforeValidator(not_bool)]
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(not_bool)]
AtLeastOne = Annotated[float, Field(ge=1, allow_inf_nan=False), BeforeValidator(not_bool)]
Text = Annotated[str, Field(min_length=1)]


class Options(BaseModel):
    """Base of every part of a config: frozen, keyword-only, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


STRATEGIES: dict[str, tuple[registry.Table, Any]] = {
    "objective": (registry.OBJECTIVES, "next_token"),
    "optimizer": (registry.OPTIMIZERS, "adamw"),
    "schedule": (registry.SCHEDULES, "cosine"),
    "sync": (registry.SYNC_CHOICES, "all_reduce"),
    "average": (registry.AVERAGES, "none"),
}


def choose(table: registry.Table, value: Any) -> Options:
    """Turn ``name`` or ``{name: ..., options}`` into the strategy's config.

    Raises ``ConfigError`` with every problem, each under the path ``table.kind``.
    """
    if isinstance(value, Options):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError(
            f"{table.kind}={value!r}: expected a name or {{name: ..., options}}; known: {', '.join(table)}"
        )
    config_class: type[Options] = table.load(value["name"])
    try:
        return config_class.model_validate({key: item for key, item in value.items() if key != "name"})
    except ValidationError as error:
        raise ConfigError(sentences(error, config_class, (table.kind,))) from None


def named(options: Options) -> dict[str, Any]:
    """The form that ``choose`` reads."""
    return {"name": strategy_name(options), **options.model_dump(mode="json")}


def strategy_name(options: Options) -> str:
    """The name under which a strategy's config class stands in its table."""
    inner = (registry.REDUCERS, registry.SERVERS, registry.AGGREGATES)
    for table in (*(table for table, _ in STRATEGIES.values()), *inner):
        for name in table:
            if table.target(name) == f"{type(options).__module__}:{type(options).__name__}":
                return name
    raise ConfigError(f"{type(options).__name__} stands in no strategy table")


@dataclass(frozen=True)
class ChosenFrom:
    """Marks a field of a strategy, ``Annotated[Any, ChosenFrom(table)]``: it takes what ``choose`` takes."""

    table: registry.Table

    def __get_pydantic_core_schema__(self, _: Any, __: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            partial(choose, self.table), serialization=core_schema.plain_serializer_function_ser_schema(named)
        )

    def __get_pydantic_json_schema__(self, _: Any, __: Any) -> dict[str, Any]:
        names = {"enum": list(self.table)}
        return {"anyOf": [names, {"type": "object", "properties": {"name": names}, "required": ["name"]}]}


def sentences(error: ValidationError, model: type[Options], prefix: tuple[str, ...]) -> list[str]:
    """One sentence for each problem pydantic found: path, value, what was expected."""
    sentences: dict[str, str] = {}  # by path: a union reports one problem for each of its members
    for problem in error.errors(include_url=False):
        location = [part for part in problem["loc"] if not _is_union_tag(part)]
        path = ".".join(str(part) for part in (*prefix, *location))
        if problem["type"] == "extra_forbidden":
            known = _fields_at(model, location[:-1])
            sentence = f"{path}: unknown key, {registry.unknown(str(location[-1]), known).partition(', ')[2]}"
        elif problem["type"] == "missing":
            sentence = f"{path} is missing"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:].replace("Input should be", "expected")
            message = message.replace("input should be", "expected").replace("string should have", "expected")
            value = problem["input"]
            shown = f"={value!r}" if not isinstance(value, dict | BaseModel) else ""
            sentence = f"{path}{shown}: {message}"
        sentences[path] = f"{sentences[path]}, or {sentence.rpartition(': ')[2]}" if path in sentences else sentence
    return list(sentences.values())


def _is_union_tag(part: Any) -> bool:
    """Pydantic puts the member of a union that it tried into the path (``tuple[...]``, ``SourceConfig``)."""
    return isinstance(part, str) and (part in {"str", "int", "SourceConfig"} or "[" in part)


def _fields_at(model: type[Options], location: list[Any]) -> list[str]:
    fields = model.model_fields
    for part in location:
        inner = _model_in(fields[part].annotation) if part in fields else None
        fields = inner.model_fields if inner else fields
    return list(fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field is, or that stands in its list or among its members."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for member in get_args(annotation) if (inner := _model_in(member))), None)
