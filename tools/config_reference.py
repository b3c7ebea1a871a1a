"""Write docs/reference/config.md, the table of every key of a config, from the classes in paceline.config.

python tools/config_reference.py            write the page
python tools/config_reference.py --check    fail if the page is not what would be written
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import yaml

from paceline.config import STRATEGIES, Config, Options, strategy_name
from paceline.registry import AGGREGATES, REDUCERS, SERVERS, Table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "config.md"
HEAD = """\
# Config reference

Every key of a config file. This page is generated from the classes that read the file: edit those, then run
`make docs`. How the file is meant to be used stands in [the guide](../guides/config.md).
"""


def main() -> None:
    """Write the page, or compare it."""
    page = render()
    if "--check" not in sys.argv[1:]:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        sys.exit(f"{PAGE} is not what the config classes say: run `make docs` and commit the page")


def render() -> str:
    """The whole page."""
    parts = {name: section(Config, name) for name in Config.model_fields}
    plain = [name for name, part in parts.items() if part is None and name not in STRATEGIES]
    page = [HEAD, f"## Top level\n\n{table(Config, plain)}"]
    for name, part in parts.items():
        if name in STRATEGIES:
            page.append(strategy_section(name))
        elif part is not None:
            page.append(f"## `{name}`\n\n{summary(part)}\n\n{table(part, part.model_fields)}")
            inner = {key: section(part, key) for key in part.model_fields}
            for key, below in inner.items():
                if below is not None:
                    page.append(f"### `{name}.{key}`\n\n{summary(below)}\n\n{table(below, below.model_fields)}")
    return "\n".join(page)


def section(owner: type[Options], name: str) -> type[Options] | None:
    """The class of a key that is a section; None for a plain value and for a strategy."""
    annotation = owner.model_fields[name].annotation
    kinds = [
        kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, Options)
    ]
    return kinds[0] if kinds and kinds[0] is not Options else None


def strategy_section(name: str) -> str:
    """One heading for the key, one for each strategy its table knows."""
    known, default = STRATEGIES[name]
    levels = " Or a list of these, the levels of a hierarchy, innermost first." if name == "sync" else ""
    lines = [f"## `{name}`\n\nA name, or `{{name: ..., options}}`. Default: `{default}`.{levels}\n"]
    lines += choices(name, known)
    if name == "sync":
        for inner in (REDUCERS, SERVERS, AGGREGATES):
            lines += choices(inner.kind, inner)
    return "\n".join(lines)


def choices(name: str, known: Table) -> Iterator[str]:
    """A heading for each strategy of a table."""
    for choice in known:
        cls = known.load(choice)
        yield f"### `{name}: {choice}`\n\n{summary(cls)}\n\n{table(cls, cls.model_fields)}"
        yield from below(f"{name}: {choice}", cls)


def below(name: str, cls: type[Options]) -> Iterator[str]:
    """A heading for each key of a strategy that is a section, and for those within it."""
    for key in cls.model_fields:
        if (inner := section(cls, key)) is not None:
            yield f"#### `{name}`, `{key}`\n\n{summary(inner)}\n\n{table(inner, inner.model_fields)}"
            yield from below(f"{name}, {key}", inner)


def summary(cls: type[Options]) -> str:
    """The first paragraph of the class docstring, as Markdown."""
    return (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ").replace("``", "`")


def table(cls: type[Options], names: Iterable[str]) -> str:
    """Key, type, default and meaning of some fields of ``cls``."""
    schema = cls.model_json_schema()
    meanings = attribute_docstrings(cls)
    rows = []
    for name in names:
        field = cls.model_fields[name]
        default = "required" if field.is_required() else code(field.get_default(call_default_factory=True))
        rows.append([f"`{name}`", kind(schema["properties"][name], schema), default, meanings.get(name, "")])
    if not rows:
        return "No options.\n"
    head = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join(head + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]) + "\n"


def kind(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        target = whole["$defs"][schema["$ref"].rpartition("/")[2]]
        return f"map of {', '.join(f'`{key}`' for key in target['properties'])}"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind(member, whole) for member in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(code(value) for value in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {', '.join(kind(item, whole) for item in schema['prefixItems'])}"
    if schema.get("type") == "array":
        return f"list of ({kind(schema['items'], whole)})"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)
    names = {"object": "map", "string": "text", "boolean": "true or false", "null": "null"}
    return f"{names.get(schema['type'], schema['type'])} {bounds}".strip()


def code(value: Any) -> str:
    """A default as it is written in YAML."""
    if isinstance(value, Options):
        tables = (REDUCERS, SERVERS, AGGREGATES)
        if any(type(value) is known.load(name) for known in tables for name in known):
            return f"`{strategy_name(value)}`"
        return f"`{yaml.safe_dump(value.model_dump(), default_flow_style=True).strip()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(str(item) for item in value)}]`"
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    return f"`{value}`"


def attribute_docstrings(cls: type[Options]) -> dict[str, str]:
    """Field -> the string that stands below it in the source of its class or of one it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed([base for base in cls.__mro__ if issubclass(base, Options)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(str(text))):
                    found[name] = inspect.cleandoc(text).replace("\n", " ").replace("``", "`")
    return found


if __name__ == "__main__":
    main()
