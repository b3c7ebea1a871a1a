"""Tensor parallelism: each rank of the axis computes some heads, some columns of the feed-forward layers, some slices
of every expert, and the logits of some entries of the vocabulary (Shoeybi et al. 2019, section 3); with sequence
parallelism what lies between is cut along the positions (Korthikanti et al. 2022, section 4.2).

Parameters are plain ones of the same name that hold this rank's part. In a layer there are two all-reduces forward and
two backward, or two all-gathers and two reduce-scatters each way.

Of a parameter that no rank cuts, the gradient is
- whole on every rank, where all compute the same with it: outside of regions, without sequence parallelism;
- in parts, where each rank uses it for its own heads or tokens: inside regions, and between them where the sequence is
  cut. The parts are added up at the end of a step (``Held.summed_over``).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from paceline.comm.mesh import Mesh
from paceline.errors import PlanError
from paceline.objectives.vocabulary import VocabularyCut
from paceline.parallel.blocks import blocks
from paceline.parallel.held import Held
from paceline.parallel.tensor_heads import Heads, is_attention, tell
from paceline.parallel.tensor_parameters import Parameters, even_runs
from paceline.parallel.tensor_regions import (
    Border,
    PadSequence,
    add_share,
    cut_alibi,
    cut_stack,
    enter_by_all_tensors,
    enter_by_hidden_states,
    leave_by_output,
    leave_by_row,
    see_all_features,
    select_columns,
    select_features,
)
from paceline.parallel.tensor_rules import COLUMNS, Styles, is_in, leaf_of, norm_after, parent_of, styles_of
from paceline.parallel.vocabulary import cut_head, cut_lookup, is_plain_lookup

TOKEN_BY_TOKEN = ("gate", "router", "shared_expert_gate")
"""Names of modules between regions that treat each position by itself; norms do too."""


def cut_tensor(
    model: nn.Module, mesh: Mesh, *, sequence: bool = False, patterns: Mapping[str, str] | None = None
) -> dict[str, Held]:
    """Cut a whole model, which holds its values, in place; returns how this rank holds what is cut or in parts.

    ``patterns`` (``tensor_rules.STYLES``) come before the family's rules. What is not in the result is whole, with a
    whole gradient on every rank of the axis. Raises ``PlanError`` for what cannot be cut. The model then gives logits
    of this rank's entries of the vocabulary: ``objectives`` takes its loss from these, ``gather_logits`` gives all.
    """
    if mesh.tensor.size == 1:
        return {}
    styles = styles_of(model, patterns, is_stage=mesh.pipeline.size > 1)
    cutter = _Cutter(model, mesh, styles, sequence)
    cutter.cut_regions()
    cutter.cut_vocabulary()
    if sequence:
        cutter.cut_sequence()
    return cutter.parameters.held


class _Cutter:
    """The pass at work on one model."""

    def __init__(self, model: nn.Module, mesh: Mesh, styles: Styles, sequence: bool) -> None:
        self._model: Any = model
        self._mesh = mesh
        self._axis = mesh.tensor
        self._styles = styles
        self._sequence = sequence
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._blocks = blocks(model)
        self._entrances = styles.entrances(self._blocks)
        config: Any = getattr(model, "config", None)
        self._config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._is_whole: set[str] = set()
        """Parameters in regions of which every rank has the whole gradient all the same."""
        self.parameters = Parameters(model, mesh.tensor)

    def cut_regions(self) -> None:
        """Cut all that has a style, and hook where regions are entered and left."""
        self._check_ends()
        attention: dict[str, list[str]] = {}
        for name in self._styles.of(*COLUMNS):
            owner = parent_of(name)
            if self._is_attention(owner):
                attention.setdefault(owner, []).append(name)
            else:
                self._cut_columns(name)
        for owner, layers in attention.items():
            heads = Heads.of(self._modules[owner], owner, self._config, self._axis)
            width, *_ = [self._cut_heads(name, heads) for name in layers]
            tell(self._modules[owner], heads, width)
            cut_alibi(self._modules[owner], heads)
        for name in self._styles.of("row"):
            self._cut_row(name)
        for name in self._styles.of("dim-1", "dim-2", "pair-1", "pair-2", "woven-1"):
            self._cut_parameter(name)
        for name in self._styles.of("share"):
            add_share(self._modules[parent_of(name)], leaf_of(name), self._axis)
            self.parameters.in_parts(self._modules[parent_of(name)], leaf_of(name))
        for name in self._styles.of("heads"):
            embedding = self._modules[name]
            embedding.embedding_dim = self.parameters.cut(embedding, "weight", -1)
        for name in self._styles.of("all_heads"):
            see_all_features(self._modules[name], self._axis, name)
            self._is_whole |= {parameter for *_, parameter in self.parameters.below(self._modules[name])}
        for name in self._entrances:
            self._enter(name)

    def cut_vocabulary(self) -> None:
        """Cut the head and the embedding, which may be one table; both stay whole if either is no simple layer."""
        ends: list[Any] = [getattr(self._model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
        if not is_plain_lookup(ends[0]) or type(ends[1]) is not nn.Linear:
            return
        if hasattr(self._model, "final_logits_bias"):
            raise PlanError(
                f"layout.tensor={self._axis.size}: {type(self._model).__name__} adds a buffer to its logits, which is "
                "not cut. Use tensor=1"
            )
        cuts = [VocabularyCut(axis=self._axis, vocabulary=n) for n in (ends[0].num_embeddings, ends[1].out_features)]
        for table, cut in zip(ends, cuts, strict=True):
            if not self.parameters.has(table, "weight"):  # another stage of a pipeline has it
                continue
            if self.parameters.name(table, "weight") not in self.parameters.held:  # the head may have the same table
                self.parameters.cut_rows(table, "weight")
                for holder in self.parameters.holders(table, "weight"):
                    self._cut_table(holder, cut)
        self._model.vocabulary_cut = cuts[1]

    def cut_sequence(self) -> None:
        """Cut the hidden states between the regions of every stack of blocks that has some."""
        for name in self._entrances:
            if self._styles.get(name) == "lone_column" and self._is_attention(parent_of(name)):
                raise PlanError(
                    f"layout.sequence=true: {parent_of(name)} adds its hidden states to its output, so they have to be "
                    "whole. Use sequence=false"
                )
        stacks: dict[tuple[str, int], list[nn.Module]] = {}
        for i, (name, block) in enumerate(self._blocks.items()):
            if any(is_in(entrance, name) for entrance in self._entrances):
                # A pipeline may leave several runs of neighbours here: each has a distance of its own between the
                # numbers of its blocks and their places among those that are here.
                stacks.setdefault((parent_of(name), int(leaf_of(name)) - i), []).append(block)
                self._check_between_regions(block)
        for (name, _), stack in stacks.items():
            cut_stack(stack, self._axis, name)
        if self._mesh.context.size == 1:  # which cuts the positions first, and sees to it that they divide
            PadSequence(self._axis.size).install(self._model)

    def _check_ends(self) -> None:
        """Where layers lead into regions of a block, others must lead out of them."""
        for block in self._blocks:
            inward, outward = (
                [name for name in self._styles.of(*styles) if is_in(name, block)] for styles in (COLUMNS, ("row",))
            )
            if bool(inward) != bool(outward):
                lonely, style = (inward[0], "row") if inward else (outward[0], "column")
                raise PlanError(
                    f"layout.tensor={self._axis.size}: {lonely} is cut, and nothing of {block} is a {style}, so that a "
                    "region would have one end. Name the other in layout.tensor_patterns, or use tensor=1"
                )

    def _is_attention(self, owner: str) -> bool:
        """By the name within the block, so that no name of a stack of blocks is taken for it."""
        block = next((block for block in self._blocks if is_in(owner, block)), "")
        return is_attention(owner.removeprefix(block))

    def _cut_columns(self, name: str) -> None:
        linear, parts = self._linear(name), 2 if self._styles[name] == "pair" else 1
        features = self.parameters.cut(linear, "weight", -1 if isinstance(linear, Conv1D) else 0, parts=parts)
        if linear.bias is not None:
            self.parameters.cut(linear, "bias", 0, parts=parts)
        setattr(linear, "nf" if isinstance(linear, Conv1D) else "out_features", features)

    def _cut_heads(self, name: str, heads: Heads) -> int:
        """Cut a layer by heads, or let it compute only those this rank needs; returns the width of a head."""
        linear = self._linear(name)
        dim = -1 if isinstance(linear, Conv1D) else 0
        parts = heads.fused(leaf_of(name), self._styles[name])
        features: int = linear.weight.shape[dim]
        width, rest = divmod(features, sum(parts))
        if rest:
            raise PlanError(
                f"layout.tensor={self._axis.size}: the {features} features of {name} are not those of "
                f"{' + '.join(map(str, parts))} heads. Use tensor=1, or name it in layout.tensor_patterns"
            )
        own = heads.own_features(parts, width)
        keys = {"weight": dim} | ({} if linear.bias is None else {"bias": 0})
        if all(number % self._axis.size == 0 for number in parts):
            runs = even_runs([number * width for number in parts], self._axis.size, self._axis.index)
            for key, key_dim in keys.items():
                self.parameters.hold(linear, key, key_dim, runs, len(own))
            setattr(linear, "nf" if isinstance(linear, Conv1D) else "out_features", len(own))
            return width
        for key in keys:
            self.parameters.in_parts(linear, key)
        norm = norm_after(name)
        if self._styles.pop(norm, None) == "all_heads":  # it sees them all, and the choice is made behind it
            select_features(self._modules[norm], torch.tensor(own))
        else:
            select_columns(linear, torch.tensor(own))
        return width

    def _cut_row(self, name: str) -> None:
        linear, border = self._linear(name), self._border(name)
        features = self.parameters.cut(linear, "weight", 0 if isinstance(linear, Conv1D) else -1)
        setattr(linear, "nx" if isinstance(linear, Conv1D) else "in_features", features)
        leave_by_row(linear, border)
        if linear.bias is None:
            return
        if border.sequence:
            self.parameters.in_parts(linear, "bias")
        else:
            self._is_whole.add(self.parameters.name(linear, "bias"))

    def _cut_parameter(self, name: str) -> None:
        """Cut a parameter that is not of a linear layer: of experts, or one number for each head."""
        owner, key = self._modules[parent_of(name)], leaf_of(name)
        kind, dim = self._styles[name].split("-")
        in_vector = getattr(owner, key).ndim == 1
        parts, unit = {"dim": (1, 1), "pair": (2, 1), "woven": (1, 2)}[kind]
        self.parameters.cut(owner, key, 0 if in_vector else -int(dim), parts=parts, unit=unit)

    def _enter(self, name: str) -> None:
        """Hook an entrance; of what is whole behind it, every rank has a part of the gradient."""
        module, border, is_expert = self._modules[name], self._border(name), self._styles.get(name) == "experts"
        if is_expert:
            enter_by_all_tensors(module, border)
            leave_by_output(module, border)
        else:
            enter_by_hidden_states(module, border)
        for inner, key, parameter in self.parameters.below(module):
            if is_expert and parameter not in self.parameters.held:
                raise PlanError(
                    f"layout.tensor={self._axis.size}: {parameter} is not cut, and every rank would add it to what "
                    "leaves the experts. Use tensor=1"
                )
            if parameter not in self._is_whole:
                self.parameters.in_parts(inner, key)

    def _border(self, name: str) -> Border:
        sequence = self._sequence and any(is_in(name, block) for block in self._blocks)
        return Border(axis=self._axis, where=name, sequence=sequence)

    def _cut_table(self, table: nn.Module, cut: VocabularyCut) -> None:
        name = self._name(table)
        if isinstance(table, nn.Embedding):
            cut_lookup(table, cut, name)
        elif type(table) is nn.Linear:
            cut_head(table, cut, name)
            if isinstance(table.bias, nn.Parameter):  # a stage of a pipeline may lack it
                self.parameters.cut_rows(table, "bias")
        else:
            raise PlanError(
                f"layout.tensor={self._axis.size}: {name}, a {type(table).__name__}, shares the table of the "
                "vocabulary; expected only embeddings and linear layers to. Use tensor=1"
            )

    def _check_between_regions(self, block: nn.Module) -> None:
        """What treats positions one by one sees only this rank's: its gradient is in parts. All else is refused."""
        for inner, key, parameter in self.parameters.below(block):
            if parameter in self.parameters.held or parameter in self._is_whole:
                continue
            name = self._name(inner)
            if "norm" not in type(inner).__name__.lower() and leaf_of(name) not in TOKEN_BY_TOKEN:
                raise PlanError(
                    f"layout.sequence=true: {name}, a {type(inner).__name__}, stands between regions and is not known "
                    "to treat each position by itself. Use sequence=false"
                )
            self.parameters.in_parts(inner, key)

    def _name(self, module: nn.Module) -> str:
        return next(name for name, other in self._modules.items() if other is module)

    def _linear(self, name: str) -> Any:
        linear = self._modules[name]
        if type(linear) not in (nn.Linear, Conv1D):
            raise PlanError(
                f"layout.tensor={self._axis.size}: {name} is a {type(linear).__name__}; expected a linear layer. Use "
                "tensor=1"
            )
        return linear
