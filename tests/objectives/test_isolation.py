import numpy as np
import pytest
import torch
from torch import nn

from paceline.errors import ModelError
from paceline.objectives.isolation import check_isolation, document_numbers, document_positions
from paceline.objectives.masked import Masked
from paceline.objectives.next_token import NextToken
from paceline.objectives.right_to_left import RightToLeft
from paceline.objectives.seq2seq import Seq2Seq


def test_positions_restart_at_each_document_and_in_the_padding():
    starts = [np.array([0, 3, 4]), np.array([], np.int64), np.array([2, 5])]
    assert document_positions(starts, [6, 4, 5]).tolist() == [
        [0, 1, 2, 0, 0, 1],
        [0, 1, 2, 3, 0, 1],
        [0, 1, 0, 1, 2, 0],
    ]


def test_documents_are_numbered_within_their_row():
    assert document_numbers(np.array([[0, 1, 0, 0], [0, 1, 2, 3]])).tolist() == [[1, 1, 2, 3], [1, 1, 1, 1]]


@pytest.mark.parametrize("options", [NextToken(), RightToLeft()], ids=lambda options: type(options).__name__)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mistral", "gemma", "gpt_neox", "mixtral", "olmo"])
def test_decoders_that_keep_documents_apart(family, options, model, context):
    check_isolation(model(family), options, context(isolate_documents=True))


@pytest.mark.parametrize("family", ["opt", "falcon", "bloom", "mamba"])
def test_decoders_that_do_not_are_refused_by_name(family, model, context):
    net = model(family)
    with pytest.raises(ModelError, match=rf"{type(net).__name__} \(model_type {family}\) lets attention cross"):
        check_isolation(net, NextToken(), context(isolate_documents=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("special", [{}, {"cls": 3, "sep": 4}], ids=["bare", "cls-sep"])
@pytest.mark.parametrize("family", ["bert", "albert"])
def test_encoders_that_keep_documents_apart(family, attention, special, model, context):
    check_isolation(model(family, "masked", attention), Masked(), context(isolate_documents=True, **special))


def test_an_encoder_whose_positions_do_not_begin_at_zero_is_refused(model, context):
    with pytest.raises(ModelError, match="does not treat a packed document as the same document alone"):
        check_isolation(model("roberta", "masked"), Masked(), context(isolate_documents=True))


def test_a_model_that_ignores_positions_but_not_boundaries_is_refused(model, context):
    class Absolute(nn.Module):
        """Adds learned positions that do not restart to a model that keeps documents apart."""

        def __init__(self):
            super().__init__()
            self.inner, self.table = model("llama"), nn.Embedding(16, 64)

        def forward(self, input_ids, position_ids=None, use_cache=False):
            logits = self.inner(input_ids, position_ids=position_ids, use_cache=use_cache).logits
            return logits + self.table.weight[: input_ids.shape[1]]

    with pytest.raises(ModelError, match="does not treat a packed document as the same document alone"):
        check_isolation(Absolute(), NextToken(), context(isolate_documents=True))


def test_a_leak_in_one_of_the_layers_is_seen(model, context):
    net = model("llama")
    net.model.layers[1].register_forward_pre_hook(
        lambda layer, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
    )
    with pytest.raises(ModelError, match="lets attention cross"):
        check_isolation(net, NextToken(), context(isolate_documents=True))


def test_weights_that_show_nothing_are_no_proof(model, context):
    net = model("llama")
    for layer in net.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(ModelError, match="cannot be checked"):
        check_isolation(net, NextToken(), context(isolate_documents=True))


def test_own_module_without_positions_is_refused(context):
    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(64, 64)

        def forward(self, input_ids):
            return self.table(input_ids)

    with pytest.raises(ModelError, match="needs position_ids"):
        check_isolation(Bigram(), NextToken(), context(isolate_documents=True))


@pytest.mark.parametrize("tokens", [1, 2])
def test_rows_too_short_for_two_documents_pass(tokens, model, context):
    check_isolation(model("opt"), RightToLeft(), context(isolate_documents=True, sequence_tokens=tokens))


def test_pairs_have_nothing_to_check(model, context):
    options = Seq2Seq(source="en", target="de")
    check_isolation(model("t5", "seq2seq"), options, context(isolate_documents=True))


def test_training_mode_and_gradients_are_left_as_they_were(model, context):
    net = model("gpt2")
    net.train()
    net.transformer.drop.eval()
    before = [module.training for module in net.modules()]
    check_isolation(net, NextToken(), context(isolate_documents=True))
    assert [module.training for module in net.modules()] == before
    assert torch.is_grad_enabled()
