"""Which module is cut how, what each rank then holds, and what is refused. Nothing is sent: each rank stands alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from paceline.comm.mesh import Axis, Mesh, Tally
from paceline.errors import PlanError
from paceline.models.heads import auto_class
from paceline.models.tiny import TINY
from paceline.parallel.tensor import cut_tensor
from paceline.parallel.tensor_heads import Heads
from paceline.parallel.tensor_parameters import even_runs
from paceline.parallel.tensor_rules import STYLES, Styles, styles_of


def build(family, **changes):
    head, options = TINY[family]
    options = {**options, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, **changes}
    torch.manual_seed(0)
    return auto_class(head).from_config(AutoConfig.for_model(options.pop("model_type"), **options))


def mesh(size, index=0):
    alone = {name: Axis(name=name) for name in ("pipeline", "shard", "context", "states", "world")}
    return Mesh(**alone, tensor=Axis(name="tensor", index=index, size=size), states_mesh=None, tally=Tally())


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("family", sorted(TINY))
def test_the_ranks_parts_are_the_whole(family, ranks, sequence):
    """Every value of every parameter is held by one rank, or by all, of which one counts it."""
    changes = {"num_attention_heads": 12, "hidden_size": 48} if ranks == 3 and family not in ("gpt2", "t5") else {}
    changes |= {"num_heads": 12} if family == "t5" else {"n_head": 12, "n_embd": 48} if family == "gpt2" else {}
    whole = dict(build(family, **changes).named_parameters())
    seen = {name: torch.zeros_like(parameter) for name, parameter in whole.items()}
    counted = dict(seen)
    for index in range(ranks):
        model = build(family, **changes)
        held = cut_tensor(model, mesh(ranks, index), sequence=sequence and family != "albert")
        assert [name for name, _ in model.named_parameters()] == list(whole)
        for name, parameter in model.named_parameters():
            part = held.get(name)
            if part is None or not part.cuts:
                assert torch.equal(parameter, whole[name])
                owns = part.is_owner if part is not None else index == 0
                counted[name] = counted[name] + float(owns)
                continue
            assert part.full_shape == whole[name].shape and part.summed_over is None and part.is_owner
            padding = torch.ones_like(parameter)
            (cut,) = part.cuts
            for run in cut.runs:
                local = parameter.narrow(cut.dim, run.inner, run.size)
                assert torch.equal(local, whole[name].narrow(cut.dim, run.start, run.size))
                counted[name] = counted[name].clone()
                counted[name].narrow(cut.dim, run.start, run.size).add_(1.0)
                padding.narrow(cut.dim, run.inner, run.size).zero_()
            assert torch.count_nonzero(parameter * padding) == 0
    for name, times in counted.items():
        assert torch.equal(times, torch.ones_like(times)), name


@pytest.mark.parametrize("family", sorted(TINY))
def test_most_of_a_model_is_cut(family):
    """What stays whole is small: norms, biases, positions, routers."""
    model = build(family, vocab_size=1024)
    before = sum(parameter.numel() for parameter in model.parameters())
    cut_tensor(model, mesh(2))
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.6 * before


def test_gradients_in_parts_are_named():
    """Norms over local heads always, those between regions where the sequence is cut; others are whole."""
    for sequence in (False, True):
        held = cut_tensor(build("qwen3"), mesh(2), sequence=sequence)
        in_parts = {name.rpartition(".layers.")[2] for name, part in held.items() if part.summed_over is not None}
        inside = {f"{layer}.self_attn.{which}_norm.weight" for layer in (0, 1) for which in "qk"}
        between = {f"{layer}.{place}_layernorm.weight" for layer in (0, 1) for place in ("input", "post_attention")}
        assert in_parts == inside | (between if sequence else set())
        assert "model.norm.weight" not in held


def test_row_biases_are_whole_or_in_parts_with_the_sequence():
    name = "transformer.h.0.attn.c_proj.bias"
    assert name not in cut_tensor(build("gpt2"), mesh(2))
    assert cut_tensor(build("gpt2"), mesh(2), sequence=True)[name].summed_over is not None


def test_tied_tables_stay_tied():
    model = build("gpt2")
    held = cut_tensor(model, mesh(2))
    assert model.lm_head.weight is model.transformer.wte.weight and len(model.lm_head.weight) == 64
    assert "lm_head.weight" not in held


@pytest.mark.parametrize(
    ("query", "key_value", "ranks", "own"),
    [
        (4, 4, 2, [[0, 1], [2, 3]]),
        (4, 2, 2, [[0], [1]]),
        (4, 2, 4, [[0], [0], [1], [1]]),
        (4, 1, 2, [[0], [0]]),
        (6, 2, 3, [[0], [0, 1], [1]]),
        (6, 3, 2, [[0, 0, 1], [1, 2, 2]]),
        (12, 3, 2, [[0, 0, 0, 0, 1, 1], [1, 1, 2, 2, 2, 2]]),
    ],
)
def test_key_value_heads_of_a_rank(query, key_value, ranks, own):
    """Repeated as often as the query heads ask, each gives every query head of the rank its own key/value head."""
    for rank in range(ranks):
        heads = Heads(query=query, key_value=key_value, ranks=ranks, rank=rank)
        assert heads.own_key_values == own[rank]
        each = len(heads.own_queries) // len(own[rank])
        repeated = [head for head in own[rank] for _ in range(each)]
        assert repeated == [head // (query // key_value) for head in heads.own_queries]


@pytest.mark.parametrize(("sizes", "pieces"), [([7], 3), ([4, 4], 2), ([5, 5], 3), ([6, 2, 2], 2)])
def test_even_runs_cover_every_part_once(sizes, pieces):
    rows = [row for i in range(pieces) for run in even_runs(sizes, pieces, i) for row in _rows(run)]
    assert sorted(rows) == list(range(sum(sizes)))
    lengths = [sum(run.size for run in even_runs(sizes, pieces, i)) for i in range(pieces)]
    assert max(lengths) - min(lengths) <= len(sizes)
    for i in range(pieces):
        runs = even_runs(sizes, pieces, i)
        assert [run.inner for run in runs] == [sum(run.size for run in runs[:j]) for j in range(len(runs))]


def _rows(run):
    return range(run.start, run.start + run.size)


def test_entrances_are_the_modules_round_a_column_and_its_row():
    styles = Styles(
        {
            "l.0.attn.q": "column",
            "l.0.attn.out.gate": "column",
            "l.0.attn.out.o": "row",
            "l.0.fc1": "column",
            "l.0.fc2": "row",
            "l.0.moe.experts": "experts",
        }
    )
    assert styles.entrances({"l.0"}) == ["l.0.moe.experts", "l.0.attn", "l.0.fc1"]


class Gated(nn.Module):
    """A block of no family that is known."""

    def __init__(self, attention=False):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})])
        if attention:
            self.layers[0]["attention"] = nn.ModuleDict({"q": nn.Linear(4, 4), "o": nn.Linear(4, 4)})


def test_patterns_cut_what_has_no_plan():
    held = cut_tensor(Gated(), mesh(2, 1), patterns={"layers.*.up": "column", "down": "row"})
    assert {name: (part.cuts[0].dim, part.cuts[0].runs[0].start) for name, part in held.items()} == {
        "layers.0.up.weight": (0, 3),
        "layers.0.up.bias": (0, 3),
        "layers.0.down.weight": (1, 3),
    }


def test_patterns_come_before_the_rules_of_a_family():
    model = build("llama")
    whole = {f"layers.0.mlp.{name}_proj": "whole" for name in ("gate", "up", "down")}
    held = cut_tensor(model, mesh(2), patterns=whole)
    assert not any(".0.mlp." in name for name in held)
    assert "model.layers.1.mlp.up_proj.weight" in held and "model.layers.0.self_attn.q_proj.weight" in held


@pytest.mark.parametrize(
    ("model", "size", "options", "message"),
    [
        (
            Gated,
            2,
            {},
            r"layout.tensor needs to know how Gated \(model_type None\) is cut.* Set layout.tensor_patterns",
        ),
        (Gated, 2, {"patterns": {"up": "columns"}}, r"style 'columns'; expected one of column, "),
        (Gated, 2, {"patterns": {"upp": "column"}}, r"'upp' fits no module or parameter of Gated"),
        (Gated, 2, {"patterns": {"down": "row"}}, r"layers.0.down is cut, and nothing of layers.0 is a column"),
        (
            lambda: build("llama"),
            2,
            {"patterns": {"layers.1.mlp.down_proj": "whole", "layers.1.self_attn.o_proj": "whole"}},
            r"layers.1.* is cut, and nothing of model.layers.1 is a row",
        ),
        (Gated, 7, {"patterns": {"up": "column", "down": "row"}}, r"of shape \(6, 4\) .* Use tensor=6 or fewer"),
        (
            lambda: Gated(attention=True),
            2,
            {"patterns": {"attention.q": "column", "attention.o": "row"}},
            r"layers.0.attention does not say how many heads it has",
        ),
        (lambda: build("llama"), 3, {}, r"=3 does not divide the 4 attention heads of .*self_attn. Use one of 1, 2, 4"),
        (lambda: build("albert"), 2, {"sequence": True}, r"attention adds its hidden states to its output"),
        (
            lambda: build("llama"),
            2,
            {"sequence": True, "patterns": {f"mlp.{name}_proj": "whole" for name in ("gate", "up", "down")}},
            r"model.layers.0.mlp.gate_proj, a Linear, stands between regions.* Use sequence=false",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(model, size, options, message):
    with pytest.raises(PlanError, match=message):
        cut_tensor(model(), mesh(size), **options)


def test_a_stage_of_a_pipeline_may_lack_what_a_pattern_fits():
    stage = build("llama")
    stage.model.layers[1] = nn.Identity()
    stage.model.embed_tokens.weight = stage.lm_head.weight = None
    in_pipeline = replace(mesh(2), pipeline=Axis(name="pipeline", size=2))
    held = cut_tensor(stage, in_pipeline, patterns={"layers.1.mlp.up_proj": "column"})
    assert {name.split(".")[2] for name in held} == {"0"}
    with pytest.raises(PlanError, match=r"fits no module"):
        cut_tensor(stage, mesh(2), patterns={"layers.1.mlp.up_proj": "column"})


def test_stages_cut_the_sequence_run_by_run():
    """A rank that holds blocks 0, 1 and 3 hands whole hidden states on after 1, and gets whole ones before 3."""
    model = build("llama", num_hidden_layers=4)
    model.model.layers[2] = nn.Identity()
    cut_tensor(model, mesh(2), sequence=True)
    first, last, _, alone = model.model.layers
    assert (len(first._forward_pre_hooks), len(first._forward_hooks)) == (1, 0)
    assert (len(last._forward_pre_hooks), len(last._forward_hooks)) == (0, 1)
    assert (len(alone._forward_pre_hooks), len(alone._forward_hooks)) == (1, 1)


def test_a_family_that_its_plan_does_not_fit_is_refused():
    config = AutoConfig.for_model("doge", hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64)
    with pytest.raises(PlanError, match=r"'doge', which makes its attention mask from the values"):
        cut_tensor(auto_class("causal").from_config(config), mesh(2))


def test_every_style_is_explained_and_used():
    used = {style for family in TINY for style in styles_of(build(family), None).values()}
    assert used <= set(STYLES)
    assert {"column", "lone_column", "pair", "qkv", "row", "enter", "experts", "dim-1", "pair-2", "heads"} <= used


class Summed(nn.Module):
    """Attention whose second argument learns as well."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, hidden_states, memory):
        return self.down(self.up(hidden_states + memory))


def test_a_second_input_with_a_gradient_is_refused():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": Summed()})])})
    cut_tensor(model, mesh(2), patterns={"mlp.up": "column", "mlp.down": "row"})
    with pytest.raises(PlanError, match=r"layers.0.mlp gets 'memory' with a gradient"):
        model["layers"][0]["mlp"](torch.zeros(1, 4), torch.zeros(1, 4, requires_grad=True))
