"""Which module of a model is cut how: the family's own plan, our rules where it has none, and the user's patterns.

A pattern is the end of a module's or parameter's name; ``*`` stands for one number. A style is one of ``STYLES``.
transformers brings plans for most families of decoders. Their style names are mapped to ours here; theirs say how
DTensors are laid out at every layer, ours what a region of the model is (``tensor_regions``). Families without a plan
have rules in ``tensor_families``; a family without either is refused, until the user gives patterns.
"""

import re
from collections.abc import Container, Mapping
from typing import Any

from torch import nn

from paceline.errors import PlanError
from paceline.parallel.blocks import blocks
from paceline.parallel.tensor_families import FAMILIES, REFUSED

STYLES = {
    "column": "a linear layer into a region: its output features are cut",
    "lone_column": "such a layer that enters a region alone, because what is around it also goes round the region",
    "pair": "two such layers of equal size in one (gate and up): each is cut",
    "qkv": "queries, keys and values of all heads, one after the other, in one layer: each is cut by heads",
    "row": "a linear layer out of a region: its input features are cut, its outputs added up over the ranks",
    "enter": "a module whose first argument enters a region; without it, the nearest that holds a column and its row",
    "experts": "a module of experts in three-dimensional parameters: a region of its own",
    "dim-2": "a parameter that is cut along its last dimension but one (its only one)",
    "dim-1": "a parameter that is cut along its last dimension",
    "pair-2": "two parameters in one, along the last dimension but one: each is cut",
    "pair-1": "two parameters in one, along the last dimension: each is cut",
    "woven-1": "two parameters in one, whose columns take turns along the last dimension: cut between pairs",
    "share": "a parameter that every rank adds to its part of a sum: each adds its share of it",
    "heads": "an embedding with one column for each head",
    "all_heads": "a norm inside a region over the features of all heads",
    "whole": "not cut, whatever a plan says",
}

COLUMNS = ("column", "lone_column", "pair", "qkv")

_MODULES = {"colwise": "column", "rowwise": "row", "rowwise_split_input": "row", "moe_tp_experts": "experts"}
_PARAMETERS = {"colwise": "dim-2", "rowwise": "dim-1", "packed_colwise": "pair-2", "packed_rowwise": "pair-1"}
_PARTIAL = ("replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params", "replicate")
"""What these say of parameters inside a region holds here for all that are not cut."""
_GATHERED = {"qkv_proj": "qkv", "gate_up_proj": "pair", "q_proj": "column", "k_proj": "column", "v_proj": "column"}
"""Layers whose outputs transformers gathers, because their features are not in the order of the ranks, or a norm needs
all of them; here the parts are cut one by one, and only the norm sees all."""


def family_of(model: nn.Module) -> str | None:
    """``model_type`` of a model of transformers."""
    family: str | None = getattr(getattr(model, "config", None), "model_type", None)
    return family


class Styles(dict[str, str]):
    """The style of every module and parameter that has one, by its name in the model."""

    def of(self, *styles: str) -> list[str]:
        """The names that have one of ``styles``."""
        return [name for name, style in self.items() if style in styles]

    def entrances(self, blocks: Container[str]) -> list[str]:
        """The modules through which regions are entered.

        Those that are named, and for every other layer into a region the nearest module around it that also holds a
        layer out of it; that layer itself if there is none within its block.
        """
        found = self.of("enter", "experts", "lone_column")
        for column in self.of(*COLUMNS):
            if not any(is_in(column, entrance) for entrance in found):
                found.append(self._entrance(column, blocks))
        return [name for name in found if not any(is_in(name, other) for other in found if other != name)]

    def _entrance(self, column: str, blocks: Container[str]) -> str:
        around = parent_of(column)
        while around and around not in blocks:
            if any(is_in(row, around) for row in self.of("row")):
                return around
            around = parent_of(around)
        return column


def parent_of(name: str) -> str:
    """The name of the module around one; empty for a part of the model itself."""
    return name.rpartition(".")[0]


def leaf_of(name: str) -> str:
    """The last part of a name."""
    return name.rpartition(".")[2]


def is_in(name: str, module: str) -> bool:
    """Whether a name is that of ``module`` or of a part of it."""
    return name == module or name.startswith(f"{module}.")


def norm_after(projection: str) -> str:
    """The name of the norm that a projection (``q_proj``) may have behind it (``q_norm``)."""
    return f"{projection.removesuffix('_proj')}_norm"


def styles_of(model: nn.Module, patterns: Mapping[str, str] | None, *, is_stage: bool = False) -> Styles:
    """The style of every module and parameter that has one.

    The user's ``patterns`` come before the family's rules. Raises ``PlanError`` for an unknown style, for a pattern
    that fits nothing (unless the model is one stage of a pipeline), and where nothing is known of the model's blocks.
    """
    names = [name for name, _ in model.named_modules() if name]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    family = family_of(model)
    if reason := REFUSED.get(family or ""):
        raise PlanError(f"layout.tensor does not go with model family {family!r}, which {reason}. Use tensor=1")
    styles = _of_family(model, names)
    for pattern, style in (patterns or {}).items():
        if style not in STYLES:
            raise PlanError(
                f"layout.tensor_patterns: {pattern!r} has style {style!r}; expected one of {', '.join(STYLES)}"
            )
        found = [name for name in names if _fits(pattern, name)]
        if not found and not is_stage:
            raise PlanError(
                f"layout.tensor_patterns: {pattern!r} fits no module or parameter of {type(model).__name__}"
            )
        styles |= dict.fromkeys(found, style)
    styles = Styles({name: style for name, style in styles.items() if style != "whole"})
    if not {"row", "experts"} & set(styles.values()) and not (is_stage and not blocks(model)):
        raise PlanError(
            f"layout.tensor needs to know how {type(model).__name__} (model_type {family}) is cut, and neither "
            "transformers nor paceline has a plan for it. Set layout.tensor_patterns, such as "
            "{mlp.up_proj: column, mlp.down_proj: row}, or use tensor=1"
        )
    return styles


def _of_family(model: nn.Module, names: list[str]) -> dict[str, str]:
    plan: Mapping[str, str] = getattr(model, "_tp_plan", None) or {}
    tables = _tables(model)
    styles: dict[str, str] = {}
    for name in names:
        theirs = plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))
        if theirs is not None and not any(is_in(name, table) for table in tables):
            styles |= _translated(model, name, theirs)
    rules = FAMILIES.get(family_of(model) or "", {})
    return styles | {name: style for name in names for pattern, style in rules.items() if _fits(pattern, name)}


def _tables(model: Any) -> list[str]:
    """The modules over the vocabulary, which are cut by a pass of their own, and the embeddings of other things."""
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    return [name for name, module in model.named_modules() if module in ends or isinstance(module, nn.Embedding)]


def _translated(model: nn.Module, name: str, theirs: str) -> dict[str, str]:
    leaf = leaf_of(name)
    is_module = name in dict(model.named_modules())
    if theirs in _PARTIAL:
        return {}
    if theirs == "colwise_gather_output":
        if leaf not in _GATHERED:
            return {}
        norm = norm_after(name)
        weight = getattr(dict(model.named_modules()).get(norm), "weight", None)
        is_wide = weight is not None and len(weight) == model.get_submodule(name).out_features
        return {name: _GATHERED[leaf]} | ({norm: "all_heads"} if is_wide else {})
    ours = (_MODULES if is_module else _PARAMETERS).get(theirs)
    if ours is None:
        raise PlanError(
            f"layout.tensor: the plan of {family_of(model)} cuts {name} by {theirs!r}, which is not supported here. "
            "Use tensor=1"
        )
    return {name: ours}


def _fits(pattern: str, name: str) -> bool:
    expression = re.escape(pattern).replace(r"\*", r"\d+")
    return re.search(rf"(^|\.){expression}$", name) is not None
