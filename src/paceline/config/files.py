"""Configs as files: YAML, overrides from the command line, and the schema for editors."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from paceline.config.options import STRATEGIES
from paceline.config.run import Config
from paceline.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML without the silent loss of a repeated key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key: Any = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply ``key.path=value`` overrides; ``ConfigError`` if anything is wrong."""
    return Config.parse(override(read_tree(path), overrides))


def read_tree(path: str | Path) -> dict[str, Any]:
    """The plain values of a YAML file whose top level is a map."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config {str(path)!r}: {error.strerror}; `paceline init {path}` writes one") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {str(path)!r} is not text; expected a YAML file") from None
    tree = _yaml(text, f"config {str(path)!r}")
    if not isinstance(tree, dict):
        raise ConfigError(f"config {str(path)!r} holds {type(tree).__name__}; expected `key: value` lines")
    return tree


def override(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set ``a.b.c=value`` in a copy of ``tree``; values are read as YAML."""
    result: dict[str, Any] = _copy(tree)
    for item in overrides:
        path, equals, text = item.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"override {item!r}: expected key.path=value, for example train.steps=100")
        node = result
        for key in keys[:-1]:
            child = node.get(key)
            if node is result and key in STRATEGIES:
                child = STRATEGIES[key][1] if child is None else child
                child = {"name": child} if isinstance(child, str) else child
            node[key] = child = dict(child) if isinstance(child, dict) else {}
            node = child
        node[keys[-1]] = _yaml(text, f"override {item!r}")
    return result


def schema() -> dict[str, Any]:
    """The JSON schema of a config file, with the options of every strategy."""
    whole = Config.model_json_schema()
    for key, (table, default) in STRATEGIES.items():
        forms: list[dict[str, Any]] = [{"enum": list(table)}]
        for name in table:
            form = table.load(name).model_json_schema(ref_template=f"#/$defs/{key}.{name}.{{model}}")
            for inner, definition in form.pop("$defs", {}).items():
                whole["$defs"][f"{key}.{name}.{inner}"] = definition
            form["properties"] = {"name": {"const": name}, **form.get("properties", {})}
            form["required"] = ["name", *form.get("required", [])]
            forms.append(form)
        if key == "sync":
            forms.append({"type": "array", "items": {"anyOf": list(forms)}, "minItems": 1})
        whole["properties"][key] = {"anyOf": forms, "default": default}
    whole["required"] = [key for key in whole["required"] if key not in STRATEGIES]
    whole["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return whole


def _yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{what} is not valid YAML{where}: {getattr(error, 'problem', error)}") from None


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value
