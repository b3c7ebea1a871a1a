"""A sequence cut over ranks against the same in one process: loss and every gradient, fp64."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from meshes import replica
from paceline.comm.mesh import Axis, Mesh, Tally
from paceline.errors import PlanError
from paceline.objectives.base import token_loss
from paceline.parallel import visible
from paceline.parallel.context import DOCUMENTS, cut_context
from paceline.parallel.documents import find_documents
from paceline.parallel.recompute import recompute
from paceline.plan.layout import Grid
from parallel.context_models import FAMILIES, SHAPE, build, make_batch
from tolerances import FP64_EQUAL

norm = torch.linalg.vector_norm


def gradients(model, batch):
    model.zero_grad()
    loss = token_loss(model, batch)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def summed(mesh, loss, found):
    """Loss and gradients of all ranks together."""
    return mesh.context.all_reduce(loss), {name: mesh.context.all_reduce(g.clone()) for name, g in found.items()}


def worst_error(expected, found):
    """Of loss and gradients, relative; a gradient near 0, such as that of a key's bias, is measured by all others."""
    errors = {"loss": abs(float(found[0].double() / expected[0].double()) - 1)}
    floor = 1e-5 * norm(torch.stack([norm(gradient) for gradient in expected[1].values()]))
    for name, gradient in expected[1].items():
        error = norm(found[1][name].double() - gradient.double()) / torch.maximum(norm(gradient), floor)
        errors[name] = float(error)
    name = max(errors, key=errors.get)
    return errors[name], name


MUTANTS = {
    "positions from 0": lambda part: {"position_ids": torch.arange(part.labels.shape[1]).expand_as(part.labels)},
    "documents lost": lambda part: {DOCUMENTS: part.inputs[DOCUMENTS][:, :0]},
    "documents of the part": lambda part: {DOCUMENTS: torch.zeros_like(part.inputs[DOCUMENTS])},
}


@patch.object(torch.Tensor, "float", torch.Tensor.double)  # Gemma's norms add up their gradients over positions in fp32
def compare(member, family, attention, kind, tokens, options):
    """What differs most between one process and the sum over ranks; this rank's targets, and what it sent."""
    visible.TILE_TOKENS = 4
    with replica(member, Grid(context=member.size)) as mesh:
        model = build(family)
        batch = make_batch(family, kind, tokens)
        expected = gradients(model, batch)
        cut = cut_context(model, mesh, attention=attention)
        if (how := options.get("recompute", "none")) != "none":
            recompute(model, how)
        part = cut.split(batch)
        if "mutant" in options:
            part = replace(part, inputs=part.inputs | MUTANTS[options["mutant"]](part))
        mesh.tally.clear()
        found = gradients(model, part)
        calls = dict(mesh.tally.calls)
        error, name = worst_error(expected, summed(mesh, *found))
        return {"error": error, "name": name, "count": part.count, "whole": batch.count, "calls": calls}


CASES = [(family, "plain", 24) for family in FAMILIES] + [
    (family, kind, tokens)
    for family in ("llama-2", "gemma2", "bert")
    for kind, tokens in (("documents", 24), ("padding", 24), ("masked", 24), ("plain", 21), ("documents", 19))
]


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("family", "kind", "tokens"), CASES)
def test_a_cut_sequence_equals_one_process(pool, family, kind, tokens, ranks, attention):
    results = pool.run(compare, ranks, family, attention, kind, tokens, {})
    for result in results:
        assert result["error"] <= FP64_EQUAL, result
    assert sum(result["count"] for result in results) == results[0]["whole"]
    assert kind != "masked" or any(result["count"] == 0 for result in results)


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees_what_is_wrong(pool, mutant, attention):
    for result in pool.run(compare, 2, "llama-2", attention, "documents", 24, {"mutant": mutant}):
        assert result["error"] > 0.01, result


@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize(("attention", "calls"), [("ring", (3, 4, 10)), ("ulysses", (2, 2, 4))])
def test_messages_are_those_of_attention_alone(pool, attention, calls, how):
    """In two layers on four ranks: forward once, or again where all is recomputed, and backward."""
    forward, backward, both = calls[0], calls[1] + (3 if attention == "ring" else 0), calls[2]
    assert forward + backward == both
    expected = 2 * (both + forward * (how == "full"))
    kind = ("rotate" if attention == "ring" else "all_to_all", "context", "attention")
    for result in pool.run(compare, 4, "llama", attention, "plain", 24, {"recompute": how}):
        assert result["calls"] == {kind: expected}
        assert result["error"] <= FP64_EQUAL, result


def rounded(member, attention, dtype):
    """The errors, against fp64, of one process and of the sum over ranks."""
    with replica(member, Grid(context=member.size)) as mesh:
        batch = make_batch("llama-2", "documents", 24)
        exact = gradients(build("llama-2"), batch)
        model = build("llama-2").to(dtype)
        whole = gradients(model, batch)
        found = gradients(model, cut_context(model, mesh, attention=attention).split(batch))
        return worst_error(exact, whole)[0], worst_error(exact, summed(mesh, *found))[0]


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_worse_than_in_one_process(pool, dtype, attention):
    for whole, cut in pool.run(rounded, 2, attention, dtype):
        assert 0 < cut <= 2 * whole


def whole_inputs(member, attention):
    """Whether a whole row has the logits that it had before the cut."""
    with replica(member, Grid(context=member.size)) as mesh:
        model = build("gpt_oss").eval()
        batch = make_batch("gpt_oss", "plain", 21)
        before = model(**batch.inputs).logits
        cut = cut_context(model, mesh, attention=attention)
        model(**cut.split(batch).inputs)
        return bool(torch.equal(model(**batch.inputs).logits, before))


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_inputs_that_were_not_cut_are_computed_as_before(pool, attention):
    assert all(pool.run(whole_inputs, 2, attention))


def mesh_of(context, tensor=1):
    """A mesh as one rank sees it, on which nothing can be sent."""
    sizes = {
        "pipeline": 1,
        "shard": 1,
        "context": context,
        "tensor": tensor,
        "states": context,
        "world": context * tensor,
    }
    return Mesh(**{name: Axis(name=name, size=n) for name, n in sizes.items()}, states_mesh=None, tally=Tally())


REFUSED = {
    "t5": (
        "attends from one sequence to another",
        {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 4},
    ),
    "gptj": ("runs an attention of its own", {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}),
    "bart": (
        "takes no position_ids",
        {"d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 24, "is_encoder_decoder": False},
    ),
    "llama": (
        "rope_type=dynamic, whose frequencies depend on the last position",
        {**SHAPE, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_be_cut_are_refused_with_the_reason(family):
    reason, options = REFUSED[family]
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(family, **options))
    with pytest.raises(PlanError, match=f"^layout.context=2.*{reason}"):
        cut_context(model, mesh_of(2), attention="ring")


def test_a_module_that_is_not_of_transformers_is_refused():
    with pytest.raises(PlanError, match="needs a model of transformers"):
        cut_context(torch.nn.Linear(2, 2), mesh_of(2), attention="ring")


@pytest.mark.parametrize(("context", "tensor"), [(3, 1), (2, 4)])
def test_heads_that_cannot_be_dealt_out_are_refused(context, tensor):
    with pytest.raises(PlanError, match=r"deals out 4 attention heads.*Use layout.attention=ring"):
        cut_context(build("llama"), mesh_of(context, tensor), attention="ulysses")


def test_inputs_without_a_rule_are_refused():
    batch = make_batch("llama", "plain", 24)
    cut = cut_context(build("llama"), mesh_of(2), attention="ring")
    with pytest.raises(PlanError, match="no rule by which to cut the input inputs_embeds"):
        cut.split(replace(batch, inputs=batch.inputs | {"inputs_embeds": torch.zeros(2, 24, 32)}))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.tensor([[0, 1, 1, 1]]), "padding at the end"),
        (torch.ones(1, 1, 4, 4).tril() == 1, "keeps documents apart, and nothing else"),
    ],
)
def test_masks_that_are_more_than_documents_are_refused(mask, reason):
    with pytest.raises(PlanError, match=reason):
        find_documents(None, mask)


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("gpt2", {"attn_pdrop": 0.1}, "GPT2Attention drops out 0.1 of attention"),
    ],
)
def test_what_attention_over_ranks_does_not_compute_is_refused(family, overrides, reason):
    model = build(family, overrides)
    cut = cut_context(model, mesh_of(2), attention="ring")
    with pytest.raises(PlanError, match=f"^layout.context > 1: {reason}"):
        token_loss(model, cut.split(make_batch(family, "plain", 24)))


def test_a_mask_of_all_pairs_for_a_causal_model_is_refused():
    """One process would take it as it is, and let a token see those after it."""
    model = build("llama")
    batch = make_batch("bert", "documents", 24)
    part = cut_context(model, mesh_of(2), attention="ring").split(batch)
    with pytest.raises(PlanError, match="a mask of all pairs was given to a model that is causal"):
        token_loss(model, part)
