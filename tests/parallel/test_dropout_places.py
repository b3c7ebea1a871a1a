"""What is dropped, and what its dimensions count, is seen by trying the model."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig

from paceline.objectives.base import Batch
from paceline.parallel.dropout_places import ROWS, Dimension, find_places

SOURCE, TARGET = Dimension(stream="input_ids"), Dimension(stream="decoder_input_ids")


def of(features):
    return (Dimension(features=features),)


class Own(nn.Module):
    """Does something with hidden states (B, S, 6), which depend on rows and positions."""

    def __init__(self, act):
        super().__init__()
        self.act = act
        self.embedding = nn.Embedding(99, 6)

    def forward(self, input_ids, decoder_input_ids=None):
        hidden = self.embedding(input_ids)
        self.act(hidden, None if decoder_input_ids is None else self.embedding(decoder_input_ids))
        return hidden


def places_of(act, **lengths):
    return tried(Own(act), **lengths)


def tried(model, *, tokens=20, target_tokens=None):
    inputs = {"input_ids": torch.arange(2 * tokens).view(2, tokens)}
    if target_tokens:
        inputs["decoder_input_ids"] = torch.arange(2 * target_tokens).view(2, target_tokens)
    sample = Batch(inputs=inputs, labels=inputs["input_ids"], count=0, sequences=(0, 1))
    return find_places(model, sample)


def dropped(change):
    return lambda source, target: F.dropout(change(source, target), 0.1)


KNOWN = {
    "hidden states": (lambda s, t: s, ((ROWS,), (SOURCE,), of(6))),
    "tokens": (lambda s, t: s.flatten(0, 1), ((ROWS, SOURCE), of(6))),
    "positions first": (lambda s, t: s.transpose(0, 1), ((SOURCE,), (ROWS,), of(6))),
    "heads": (lambda s, t: s.unflatten(2, (3, 2)), ((ROWS,), (SOURCE,), of(3), of(2))),
    "probabilities": (lambda s, t: s[:, None] @ s[:, None].mT, ((ROWS,), of(1), (SOURCE,), (SOURCE,))),
    "target": (lambda s, t: t, ((ROWS,), (TARGET,), of(6))),
    "across": (lambda s, t: t @ s.mT, ((ROWS,), (TARGET,), (SOURCE,))),
    "features first": (lambda s, t: s.mT, ((ROWS,), of(6), (SOURCE,))),
}


@pytest.mark.parametrize("lengths", [(20, 20), (3, 2), (12, 9)])
@pytest.mark.parametrize("name", KNOWN)
def test_dimensions_are_known_by_how_they_change(name, lengths):
    change, expected = KNOWN[name]
    places = places_of(dropped(change), tokens=lengths[0], target_tokens=lengths[1])
    assert places.unknown is None
    assert dict(places.dimensions) == {("", 0): expected} and places.calls == {"": 1}


UNKNOWN = {
    "no rows": lambda s, t: s[0],
    "no positions": lambda s, t: s.mean(1),
    "tokens in another order": lambda s, t: s.transpose(0, 1).flatten(0, 1),
    "rows and features in one": lambda s, t: s.transpose(1, 2).flatten(0, 1),
    "some positions": lambda s, t: s[:, ::2],
    "all in one": lambda s, t: s.flatten(),
    "some tokens": lambda s, t: s.flatten(0, 1)[1:],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_rows_and_positions_is_unknown(name):
    unknown = places_of(dropped(UNKNOWN[name])).unknown
    assert unknown.startswith("Own drops out a tensor of shape (") and unknown.endswith("not one of rows and positions")


DRAWN = {
    "rand": lambda s, t: torch.rand([]),
    "uniform_": lambda s, t: torch.empty_like(s).uniform_(),
    "alpha_dropout": lambda s, t: F.alpha_dropout(s, 0.1, training=True),
    "dropout2d": lambda s, t: F.dropout2d(s[None], 0.1),
    "the model draws random numbers": lambda s, t: random.random(),
}


@pytest.mark.parametrize("name", DRAWN)
def test_other_random_numbers_are_seen(name):
    model = Own(DRAWN[name])
    before = torch.get_rng_state(), random.getstate()
    unknown = tried(model).unknown
    assert name in unknown and "draws random numbers" in unknown
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_what_does_not_drop_is_no_place():
    acts = [lambda s, t: F.dropout(s, 0.0), lambda s, t: F.dropout(s, 0.1, training=False), lambda s, t: s]
    for act in acts:
        places = places_of(act)
        assert (dict(places.dimensions), places.unknown) == ({}, None)


def test_a_model_is_as_it_was():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.BatchNorm1d(6), nn.Dropout(0.1)])
            self.layers[1].eval()
            self.embedding = nn.Embedding(99, 6)

        def forward(self, input_ids):
            return self.layers[1](self.layers[0](self.embedding(input_ids).mT).mT)

    model = Stateful()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    places = tried(model)
    assert dict(places.dimensions) == {("layers.1", 0): ((ROWS,), (SOURCE,), of(6))}
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.training and not model.layers[1].training
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("rate", "unknown"), [(0.1, "model.attention=flex_attention with resid_pdrop=0.1"), (0.0, None)]
)
def test_kernels_that_cannot_be_seen_into_are_unknown_if_they_may_drop(rate, unknown):
    model = Own(lambda s, t: 1 / 0)  # not to be run
    model.config = AutoConfig.for_model(
        "gpt2", resid_pdrop=rate, embd_pdrop=0.0, attn_pdrop=0.0, summary_first_dropout=0.0
    )
    model.config._attn_implementation = "flex_attention"
    places = tried(model)
    assert places.dimensions == {} and (places.unknown or "").startswith(unknown or "")
    assert (places.unknown is None) == (unknown is None)


@pytest.mark.parametrize("lengths", [(6, None), (5, 5)])
def test_no_more_positions_are_tried_than_a_short_model_has(lengths):
    class Short(Own):
        def forward(self, input_ids, decoder_input_ids=None):
            assert input_ids.shape[1] <= lengths[0]
            return super().forward(input_ids, decoder_input_ids)

    places = tried(Short(lambda s, t: F.dropout(s, 0.1)), tokens=lengths[0], target_tokens=lengths[1])
    assert dict(places.dimensions) == {("", 0): ((ROWS,), (SOURCE,), of(6))}


def test_a_module_with_two_names_is_one_place():
    class Shared(Own):
        def __init__(self):
            super().__init__(None)
            layer = nn.Dropout(0.1)
            self.first = nn.Sequential(layer)
            self.second = nn.Sequential(layer)

        def forward(self, input_ids):
            return self.second(self.first(self.embedding(input_ids)))

    places = tried(Shared())
    assert places.names == {"first.0": "first.0", "second.0": "first.0"} and places.calls == {"first.0": 2}
