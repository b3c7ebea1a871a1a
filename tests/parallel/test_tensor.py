"""A model cut over the tensor axis against the same in one process: loss, every gradient, logits and norm; fp64."""

import pytest
import torch

from meshes import replica
from paceline.models.attention import MATMUL
from paceline.objectives.base import token_loss
from paceline.parallel.held import take
from paceline.parallel.tensor import cut_tensor
from paceline.plan.layout import Grid
from parallel.tensor_models import FAMILIES, batch_of, build, check_equal
from tolerances import FP32_GRADIENT, FP32_LOSS, FP64_EQUAL

norm = torch.linalg.vector_norm


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"albert"}))
def test_a_cut_model_equals_one_process(pool, family, ranks, sequence):
    """Neither 127 entries of the vocabulary nor 13 positions divide, nor do feed-forward layers of 50 columns and, by 4
    ranks, 2 key/value heads."""
    check_equal(pool, ranks, family, tokens=13, sequence=sequence)


@pytest.mark.parametrize("ranks", [2, 4])
def test_layers_that_are_called_again_equal_one_process(pool, ranks):
    check_equal(pool, ranks, "albert")


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 4},  # the last of three ranks has no entry
        {"num_attention_heads": 6, "num_key_value_heads": 2},  # a rank needs both, for one query head and for the other
        {"num_attention_heads": 6, "num_key_value_heads": 3},
        {"num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 4},
        {"tie_word_embeddings": False, "attention_bias": True},
    ],
)
def test_awkward_sizes(pool, changes, sequence):
    changes = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8} | changes
    check_equal(pool, 3, "qwen3", sequence=sequence, changes=changes)


@pytest.mark.parametrize("attention", ["eager", "sdpa", MATMUL])
@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_every_attention_function(pool, family, attention):
    """Longer than the window of 16, so that there is a mask."""
    check_equal(pool, 2, family, tokens=20, attention=attention)
    check_equal(pool, 2, family, tokens=20, attention=attention, sequence=True)


def of_two_groups(member, sequence):
    """Each of two groups has a batch of its own: its sums must not reach the other, or the whole world."""
    with replica(member, Grid(shard=2, tensor=2)) as mesh:
        model, whole = build("qwen3"), build("qwen3")
        batch = batch_of(model, "causal", 8 + 4 * mesh.shard.index)
        token_loss(whole, batch).backward()
        held = cut_tensor(model, mesh, sequence=sequence)
        token_loss(model, batch).backward()
        errors = []
        for name, parameter in model.named_parameters():
            gradient, expected, part = parameter.grad, whole.get_parameter(name).grad, held.get(name)
            if part is not None and part.summed_over is not None:
                gradient = part.summed_over.all_reduce(gradient.clone())
            for cut in part.cuts if part is not None else ():
                expected = take(expected, cut.dim, cut.runs, gradient.shape[cut.dim])
            errors.append(float(norm(gradient - expected) / norm(expected)))
        return max(errors)


@pytest.mark.parametrize("sequence", [False, True])
def test_groups_stay_apart(pool, sequence):
    assert max(pool.run(of_two_groups, 4, sequence)) <= FP32_GRADIENT  # norms are in fp32, partial sums rounded by it


POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 0], [*range(6), *range(7)]])


def documents(member, family, sequence):
    """The gradient of packed documents, whole and cut: known by positions that restart, or by a mask of 13 x 13."""
    model, whole = build(family), build(family)
    batch = batch_of(model, FAMILIES[family][0], 13)
    if family == "llama":
        batch.inputs.update(position_ids=POSITIONS, use_cache=False)
    else:
        number = (POSITIONS == 0).cumsum(1)
        batch.inputs["attention_mask"] = (number[:, :, None] == number[:, None, :])[:, None]
    token_loss(whole, batch).backward()
    name = "model.layers.0.self_attn.q_proj.weight"
    name = name if family == "llama" else "bert.encoder.layer.0.attention.self.query.weight"
    with replica(member, Grid(tensor=member.size)) as mesh:
        held = cut_tensor(model, mesh, sequence=sequence)
        token_loss(model, batch).backward()
        expected, local = whole.get_parameter(name).grad, model.get_parameter(name)
        return float(norm(local.grad - take(expected, 0, held[name].cuts[0].runs, len(local))) / norm(expected))


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_documents_stay_apart(pool, family, sequence):
    assert max(pool.run(documents, 2, family, sequence)) <= FP64_EQUAL


def without_targets(member, sequence):
    model = build("llama")
    batch = batch_of(model, "causal", 12)
    batch.labels.fill_(-100)
    with replica(member, Grid(tensor=member.size)) as mesh:
        cut_tensor(model, mesh, sequence=sequence)
        loss = token_loss(model, batch)
        loss.backward()
    return float(loss.detach()), max(float(parameter.grad.abs().max()) for parameter in model.parameters())


def test_a_batch_without_targets(pool):
    assert pool.run(without_targets, 2, False) == pool.run(without_targets, 2, True) == [(0.0, 0.0)] * 2


def frozen(member):
    model = build("llama")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    batch = batch_of(model, "causal", 12)
    with replica(member, Grid(tensor=member.size)) as mesh:
        cut_tensor(model, mesh)
        token_loss(model, batch).backward()
        return [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_frozen_parameters_stay_frozen(pool):
    names = [name for name, _ in build("llama").named_parameters() if "embed" in name or ".layers.0." in name]
    assert pool.run(frozen, 2) == [names] * 2


def low_precision(member, dtype, sequence):
    model, whole = build("llama").to(dtype), build("llama").to(dtype)
    batch = batch_of(model, "causal", 12)
    with replica(member, Grid(tensor=member.size)) as mesh:
        cut_tensor(model, mesh, sequence=sequence)
        loss, expected = token_loss(model, batch), token_loss(whole, batch)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(parameter.grad.dtype == dtype for parameter in model.parameters())
        return abs(float(loss.detach() / expected.detach()) - 1)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32_LOSS), (torch.bfloat16, 2**-8)])
def test_other_precisions(pool, dtype, tolerance, sequence):
    assert max(pool.run(low_precision, 2, dtype, sequence)) <= tolerance


def one_rank(member):
    model = build("llama")
    before = dict(model.named_parameters())
    with replica(member, Grid()) as mesh:
        held = cut_tensor(model, mesh, sequence=True)
    return held == {} and all(parameter is before[name] for name, parameter in model.named_parameters())


def test_an_axis_of_one_rank_changes_nothing(pool):
    assert pool.run(one_rank, 1) == [True]
