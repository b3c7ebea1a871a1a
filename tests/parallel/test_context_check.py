"""The trial that finds families whose sequence cannot be cut."""

import gc

import pytest
import torch
from torch import nn

from paceline.data.tokenizer import SpecialTokens
from paceline.errors import PlanError
from paceline.objectives.base import ObjectiveContext, token_loss
from paceline.objectives.masked import Masked
from paceline.objectives.next_token import NextToken
from paceline.parallel import context_check
from paceline.parallel.context_check import check_context
from parallel.context_models import FAMILIES, build, make_batch

CONTEXT = ObjectiveContext(special=SpecialTokens(end=1, vocabulary=61, mask=2, pad=0), sequence_tokens=40)


def check(model, *, attention="ring", size=2, options=None, isolate=False):
    context = ObjectiveContext(special=CONTEXT.special, sequence_tokens=40, isolate_documents=isolate)
    check_context(model, options or NextToken(), context, attention=attention, size=size)


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_can_be_cut_pass_and_are_left_as_they_were(family, attention):
    model = build(family).float()
    batch = make_batch(family, "plain", 24)
    before, kinds = token_loss(model, batch), (model.config._attn_implementation, model.forward)
    state = torch.get_rng_state()
    check(model, attention=attention, size=4, options=Masked() if family == "bert" else NextToken())
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.config._attn_implementation, model.forward) == kinds
    assert all(module.training for module in model.modules())
    assert torch.equal(token_loss(model, batch), before)


def test_nothing_of_the_trial_is_kept():
    """Keys and values of all layers are, while it lasts, in what transformers' table of attentions reaches."""
    check(build("llama-2").float())
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is context_check._Play]


def test_isolated_documents_pass():
    check(build("gemma2").float(), isolate=True)


class Shifted(nn.Module):
    """Mixes each position with the one before it, as short convolutions along the sequence do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_BSD):
        mixed_BSD = self.inner(hidden_BSD)
        return mixed_BSD + 0.1 * nn.functional.pad(mixed_BSD, (0, 0, 1, 0))[:, :-1]


class Averaged(nn.Module):
    """Adds the mean of all positions: the order of the pieces does not show it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_BSD):
        return self.inner(hidden_BSD) + 0.1 * hidden_BSD.mean(1, keepdim=True)


class OwnCount(nn.Module):
    """Numbers the positions it is given from 0."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_BSD, position_ids):
        own = torch.arange(hidden_BSD.shape[1]).expand_as(position_ids)
        return self.inner(hidden_BSD, position_ids=own)


def shift_keys(model):
    attention = model.model.layers[1].self_attn
    attention.v_proj = Shifted(attention.v_proj)


def average(model):
    model.model.layers[1].mlp = Averaged(model.model.layers[1].mlp)


def count(model):
    model.model.rotary_emb = OwnCount(model.model.rotary_emb)


def divide(model):
    """A part gives no numbers."""
    lengths = []

    def hook(_, __, out_BSD):
        lengths.append(out_BSD.shape[1])
        return out_BSD / (lengths[-1] == max(lengths))

    model.model.norm.register_forward_hook(hook)


def mask(model):
    """A layer that makes its mask itself."""
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )


def bypass(model):
    """No layer calls the attention it is told to."""
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states.cumsum(1), None)


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (shift_keys, "computes something else where its sequence is cut"),
        (average, "computes something else where its sequence is cut"),
        (divide, r"off by inf%"),
        (count, "computes something else where its sequence is cut"),
        (mask, "LlamaAttention makes its attention mask itself"),
        (bypass, "runs an attention of its own"),
    ],
)
def test_models_that_look_along_the_sequence_elsewhere_are_refused(spoil, reason, attention):
    model = build("llama-2").float()
    spoil(model)
    with pytest.raises(PlanError, match=reason):
        check(model, attention=attention)
    assert model.config._attn_implementation == "matmul" and "forward" not in vars(model)


def test_values_from_the_position_before_show_where_attention_hardly_counts():
    """With fresh weights what attention gives is small, and almost the same everywhere."""
    model = build("llama-2").float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    shift_keys(model)
    with pytest.raises(PlanError, match="computes something else"):
        check(model)


def test_a_model_in_which_positions_do_not_meet_cannot_be_checked():
    model = build("llama-2").float()
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(PlanError, match=r"cannot be checked: .* no logits of LlamaForCausalLM"):
        check(model)


def test_dropout_does_not_disturb_the_trial():
    check(build("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}).float())


def test_a_routing_tie_in_one_trial_does_not_refuse_a_model(monkeypatch):
    """The first of the trials is spoiled."""
    model = build("llama-2").float()
    errors = iter([0.5, 0.0])
    monkeypatch.setattr("paceline.parallel.context_check._error_of_parts", lambda *_: next(errors))
    check(model)
    assert next(errors, None) is None
