"""Which heads of an attention module a rank computes, and how the module is told.

Query heads are cut evenly. Key/value heads are too where they divide; where they do not (there may be fewer than
ranks), every rank holds all of them and computes those that its query heads need.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from paceline.comm.mesh import Axis
from paceline.errors import PlanError

QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
WIDTH = ("embed_dim", "hidden_size", "all_head_size", "inner_dim", "split_size")
"""Attributes by which attention modules know how wide all query heads are together."""
KEY_OR_VALUE = ("k_proj", "v_proj", "key", "value", "k", "v")
"""Layers of key/value heads; every other one that is cut is of query heads."""


def is_attention(name: str) -> bool:
    """Whether a module of this name is, or is in, an attention module, whose columns are cut by heads."""
    return re.search("attn|attention", name, re.IGNORECASE) is not None


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of one attention module, and those of one rank."""

    query: int
    key_value: int
    ranks: int
    rank: int

    @classmethod
    def of(cls, module: Any, name: str, config: Any, axis: Axis) -> Self:
        """Read them from the module, or else from a config; ``PlanError`` if the query heads do not divide."""
        sources = [source for source in (module, getattr(module, "config", None), config) if source is not None]
        query = _first(sources, QUERY_HEADS)
        if query is None:
            raise PlanError(f"layout.tensor={axis.size}: {name} does not say how many heads it has. Use tensor=1")
        if query % axis.size:
            legal = ", ".join(str(size) for size in range(1, query + 1) if query % size == 0)
            raise PlanError(
                f"layout.tensor={axis.size} does not divide the {query} attention heads of {name}. Use one of {legal}"
            )
        groups = getattr(module, "num_key_value_groups", None)
        key_value = query // groups if isinstance(groups, int) else _first(sources, KEY_VALUE_HEADS) or query
        return cls(query=query, key_value=key_value, ranks=axis.size, rank=axis.index)

    def fused(self, layer: str, style: str) -> list[int]:
        """The numbers of heads in a layer, one for each of its fused parts."""
        if style == "qkv":
            return [self.query, self.key_value, self.key_value]
        return [self.key_value if layer in KEY_OR_VALUE else self.query]

    @property
    def divides(self) -> bool:
        """Whether the key/value heads can be cut."""
        return self.key_value % self.ranks == 0

    @property
    def own_queries(self) -> list[int]:
        """Query heads of this rank."""
        each = self.query // self.ranks
        return list(range(self.rank * each, (self.rank + 1) * each))

    @property
    def own_key_values(self) -> list[int]:
        """Key/value heads of this rank; each serves equally many of its query heads, and may occur more than once."""
        needed = [head * self.key_value // self.query for head in self.own_queries]
        once = sorted(set(needed))
        return once if len({needed.count(head) for head in once}) == 1 else needed

    def own_features(self, parts: Sequence[int], width: int) -> list[int]:
        """Features, of heads of ``width`` each, that this rank computes of a layer of these fused parts."""
        features, begin = [], 0
        for number in parts:
            own = self.own_queries if number == self.query else self.own_key_values
            features += [begin + head * width + i for head in own for i in range(width)]
            begin += number * width
        return features


def tell(module: Any, heads: Heads, width: int) -> None:
    """Set what the module knows of its heads, which are of ``width``, to what this rank has."""
    queries, key_values = len(heads.own_queries), len(heads.own_key_values)
    told = dict.fromkeys(QUERY_HEADS, (heads.query, queries))
    told |= dict.fromkeys(KEY_VALUE_HEADS, (heads.key_value, key_values))
    told |= dict.fromkeys(WIDTH, (heads.query * width, queries * width))
    told |= {"kv_dim": (heads.key_value * width, key_values * width)}
    told |= {"num_key_value_groups": (heads.query // heads.key_value, queries // key_values)}
    for name, (all_ranks, own) in told.items():
        if getattr(module, name, None) == all_ranks:
            setattr(module, name, own)
    if hasattr(module, "config"):
        module.config = _OwnConfig(module.config, told)


class _OwnConfig:
    """A module's config, which it shares with the whole model, but for its numbers of heads."""

    def __init__(self, config: Any, told: dict[str, tuple[int, int]]) -> None:
        self._config = config
        names = (*QUERY_HEADS, *KEY_VALUE_HEADS)
        self._own = {name: told[name][1] for name in names if _read(config, name) == told[name][0]}

    def __getattr__(self, name: str) -> Any:
        if name in ("_config", "_own"):  # while a copy is made
            raise AttributeError(name)
        return self._own[name] if name in self._own else getattr(self._config, name)


def _first(sources: Iterable[Any], names: tuple[str, ...]) -> int | None:
    found = (_read(source, name) for source in sources for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _read(source: Any, name: str) -> Any:
    try:
        return getattr(source, name, None)
    except RuntimeError:  # the config of the whole model where layers differ: it has no one number of heads
        return None
