"""Dropout by place: ranks that compute the same drop the same, and others do not."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paceline.comm.mesh import Axis
from paceline.errors import PlanError
from paceline.models.blockwise import attention
from paceline.objectives.base import Batch
from paceline.parallel.dropout import Dropout
from paceline.parallel.dropout_places import find_places
from paceline.parallel.held import Cut, Held
from paceline.parallel.recompute import recompute
from paceline.parallel.tensor_parameters import even_runs

WIDTH, TOKENS, RATE = 24, 10, 0.5


class Block(nn.Module):
    """Shows which elements are dropped: hidden states, by a layer and by a call, and what attention looks at."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.layer = nn.Dropout(RATE)
        self.attend, self.is_dropped_again = "torch", False

    def forward(self, hidden, query):
        hidden = F.dropout(self.layer(hidden * self.weight), RATE, self.training)
        value = torch.eye(query.shape[2], dtype=query.dtype).expand(*query.shape[:2], -1, -1)
        seen = query @ query.mT
        if self.attend == "eager":
            seen = F.dropout(seen.softmax(-1), RATE, self.training)
        elif self.attend == "torch":
            p = RATE if self.training else 0.0
            seen = F.scaled_dot_product_attention(query, query, value, dropout_p=p, scale=1.0)
        else:
            seen = attention(query, query, value, dropout=RATE if self.training else 0.0, scale=1.0).transpose(1, 2)
        return F.dropout(hidden) if self.is_dropped_again else hidden, seen


class Model(nn.Module):
    """What a rank holds of hidden states and heads can be set."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.heads, self.features, self.positions = 4, WIDTH, slice(None)

    def forward(self, input_ids):
        rows, tokens = input_ids.shape
        query = torch.zeros(rows, self.heads, tokens, 4, dtype=torch.float64)
        outputs = [block(torch.ones(rows, tokens, self.features)[:, self.positions], query) for block in self.blocks]
        self.seen = [tensor for output in outputs for tensor in output]
        return outputs[0][0]


def batch_of(*sequences, tokens=TOKENS):
    ids = torch.zeros(len(sequences), tokens, dtype=torch.int64)
    return Batch(inputs={"input_ids": ids}, labels=ids, count=0, sequences=sequences)


def made(seed=0, tensor=None, sequence=False, held=None, **changes):
    model = Model()
    places = find_places(model, batch_of(0, 1))
    assert places.unknown is None
    dropout = Dropout(places, seed=seed, tensor=tensor or Axis(name="tensor"), sequence=sequence)
    for name, value in changes.items():
        setattr(model, name, value)
    dropout.install(model, held or {})
    return model, dropout


def kept(model, dropout, batch, step=1):
    """Hidden states and attention of both blocks, as truth values."""
    with dropout.drawing(step, batch):
        model(**batch.inputs)
    return [tensor != 0 for tensor in model.seen]


def test_a_row_drops_the_same_in_every_micro_batch():
    model, dropout = made()
    whole = kept(model, dropout, batch_of(5, 6, 7, 8))
    for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
        sequences = (5, 6, 7, 8)[part]
        found = kept(model, dropout, batch_of(*sequences, tokens=TOKENS))
        assert all(torch.equal(a, b[part]) for a, b in zip(found, whole, strict=True))
    longer = kept(model, dropout, batch_of(5, 6, 7, 8, tokens=TOKENS + 3))  # where another row is longer
    assert torch.equal(longer[0][:, :TOKENS], whole[0])
    assert torch.equal(longer[1][:, :, :TOKENS, :TOKENS], whole[1])


def test_seeds_steps_sequences_and_places_drop_differently():
    model, dropout = made()
    first = kept(model, dropout, batch_of(5, 6))
    assert 0.2 < first[0].double().mean() < 0.3 and 0.4 < first[1].double().mean() < 0.6
    others = [
        kept(model, dropout, batch_of(5, 6), step=2),
        kept(*made(seed=1), batch_of(5, 6)),
        kept(model, dropout, batch_of(7, 8)),
    ]
    for other in others:
        assert all((a == b).double().mean() < 0.75 for a, b in zip(first, other, strict=True))
    assert (first[0] == first[2]).double().mean() < 0.75 and (first[1] == first[3]).double().mean() < 0.6
    assert (first[0][0] == first[0][1]).double().mean() < 0.75


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_tensor_ranks_drop_alike_what_is_whole_and_their_part_of_what_is_cut(rank):
    """24 features and 4 heads over 3 ranks: the first has two heads."""
    whole = kept(*made(), batch_of(5, 6))
    axis = Axis(name="tensor", index=rank, size=3)
    heads = ([0, 1], [2], [3])[rank]
    model, dropout = made(tensor=axis, heads=len(heads))
    found = kept(model, dropout, batch_of(5, 6))
    assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1][:, heads])
    model, dropout = made(tensor=axis, heads=len(heads), features=8)
    features = slice(8 * rank, 8 * rank + 8)
    assert torch.equal(kept(model, dropout, batch_of(5, 6))[0], whole[0][:, :, features])


@pytest.mark.parametrize("rank", [0, 1])
def test_pieces_of_the_sequence_drop_what_the_whole_drops_there(rank):
    whole = kept(*made(), batch_of(5, 6))
    axis = Axis(name="tensor", index=rank, size=2)
    positions = slice(5 * rank, 5 * rank + 5)
    model, dropout = made(tensor=axis, sequence=True, heads=2, positions=positions)
    found = kept(model, dropout, batch_of(5, 6))
    assert torch.equal(found[0], whole[0][:, positions])
    assert torch.equal(found[1], whole[1][:, 2 * rank : 2 * rank + 2])


def test_columns_of_a_context_rank_drop_what_the_whole_drops_there():
    whole = kept(*made(), batch_of(5, 6))
    columns = torch.tensor([0, 1, 7, 8, 9])
    batch = replace(batch_of(5, 6, tokens=5), columns=columns)
    assert torch.equal(kept(*made(), batch)[0], whole[0][:, columns])


def test_attention_drops_the_same_however_it_is_computed():
    found = []
    for attend in ("torch", "eager", "own"):
        model, dropout = made()
        for block in model.blocks:
            block.attend = attend
        found.append(kept(model, dropout, batch_of(5, 6))[1])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_recompute_drops_again_what_it_dropped_though_another_micro_batch_is_current():
    gradients = []
    for again in (False, True):
        model, dropout = made()
        if again:
            recompute(model, "full", dropout)
        losses = []
        for sequence in (5, 6):
            batch = batch_of(sequence)
            with dropout.drawing(1, batch):
                model(**batch.inputs)
            losses.append((model.seen[0] * torch.arange(WIDTH)).sum() + (model.seen[2] ** 2).sum())
        with dropout.drawing(9, batch_of(8)):  # in force while the first is computed again, twice
            for _ in range(2):
                for loss in losses:
                    loss.backward(retain_graph=True)
        gradients.append([block.weight.grad.item() for block in model.blocks])
    assert gradients[0] == gradients[1] and gradients[0][0] != 0


def test_evaluation_and_a_model_that_is_not_in_a_step_are_left_alone():
    model, dropout = made()
    model.eval()
    assert all(tensor.all() for tensor in kept(model, dropout, batch_of(5)))
    model.train()
    torch.manual_seed(0)
    model(**batch_of(5).inputs)
    once = model.seen[0]
    model(**batch_of(5).inputs)
    assert not torch.equal(once, model.seen[0])


def test_what_is_kept_is_scaled_up():
    model, dropout = made()
    kept(model, dropout, batch_of(5))
    assert set(model.seen[0].flatten().tolist()) == {0.0, 4.0}
    assert torch.equal(model.seen[1].unique(), torch.tensor([0.0, 2.0 / TOKENS], dtype=torch.float64))


def test_a_part_that_is_not_known_is_refused():
    model, dropout = made(features=7)
    with pytest.raises(PlanError, match=r"dropout in blocks\.0\.layer is of a tensor of shape \(1, 10, 7\)"):
        kept(model, dropout, batch_of(5))


@pytest.mark.parametrize(("width", "is_known"), [(WIDTH, False), (2 * WIDTH, True)])
def test_pieces_of_two_layers_in_one_are_no_piece_of_the_whole(width, is_known):
    """A rank has the first half of each, not the first half of both."""
    runs = even_runs([width // 2, width // 2], 2, 0)
    held = {"up": Held(full_shape=(width, 3), cuts=(Cut(0, tuple(runs)),))}
    model, dropout = made(tensor=Axis(name="tensor", index=0, size=2), held=held, heads=2, features=WIDTH // 2)
    if is_known:
        kept(model, dropout, batch_of(5))
    else:
        with pytest.raises(PlanError, match="not known which part of the whole that is"):
            kept(model, dropout, batch_of(5))


def test_a_dropout_that_the_trial_has_not_seen_is_refused():
    model, dropout = made()
    model.blocks[1].is_dropped_again = True
    with pytest.raises(PlanError, match=r"dropout number 2 of blocks\.1 was not called when the model was tried"):
        kept(model, dropout, batch_of(5))


def test_calls_that_a_stage_passes_by_are_counted():
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.ModuleList([nn.Sequential(nn.Dropout(RATE), nn.Identity())])

        def forward(self, input_ids):
            return [self.block[0](torch.ones(*input_ids.shape, WIDTH)) for _ in range(3)][-1]

    model = Repeated()
    dropout = Dropout(find_places(model, batch_of(0, 1)), seed=0, tensor=Axis(name="tensor"), sequence=False)
    assert dropout.calls_before(["block.0"] * 3, 2) == {"block.0.0": 2}
    with pytest.raises(PlanError, match=r"block\.0\.0 is called 3 times by 1 blocks, not equally often"):
        dropout.calls_before(["block.0"] * 2, 1)
