"""What a model that is cut over the tensor axis sends, against the closed formulas."""

import pytest

from meshes import replica
from paceline.objectives.base import token_loss
from paceline.parallel.tensor import cut_tensor
from paceline.plan.layout import Grid
from parallel.tensor_models import batch_of, build, check_equal

LAYERS = 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "bert", "opt", "phi3"])
def test_collectives_of_a_dense_model(pool, family):
    """Two a layer each way; one for the embedding, one for what enters the head, one for the loss."""
    forward, backward = check_equal(pool, 2, family)
    assert forward == {"all_reduce": 2 * LAYERS + 1, "all_gather": 1}
    assert backward == {"all_reduce": 2 * LAYERS + 1}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "bert", "opt", "phi3"])
def test_collectives_with_sequence_parallelism(pool, family):
    """Two and two a layer each way. A stack's end is gathered forward, its beginning backward."""
    forward, backward = check_equal(pool, 2, family, sequence=True)
    assert forward == {"all_gather": 2 * LAYERS + 2, "reduce_scatter": 2 * LAYERS, "all_reduce": 1}
    assert backward == {"all_gather": 2 * LAYERS + 1, "reduce_scatter": 2 * LAYERS, "all_reduce": 1}


def test_collectives_of_a_mixture(pool):
    """The router's weights enter the experts as well, and with sequence parallelism its choice too."""
    forward, backward = check_equal(pool, 2, "mixtral")
    assert forward == {"all_reduce": 2 * LAYERS + 1, "all_gather": 1}
    assert backward == {"all_reduce": 3 * LAYERS + 1}
    forward, backward = check_equal(pool, 2, "mixtral", sequence=True)
    assert forward == {"all_gather": 4 * LAYERS + 2, "reduce_scatter": 2 * LAYERS, "all_reduce": 1}
    assert backward == {"all_gather": 2 * LAYERS + 1, "reduce_scatter": 3 * LAYERS, "all_reduce": 1}


def test_collectives_of_an_encoder_and_decoder(pool):
    """Two regions in a layer of the encoder, three in one of the decoder; what the encoder gives enters one of them."""
    forward, backward = check_equal(pool, 2, "t5")
    assert forward == {"all_reduce": 5 * LAYERS + 2, "all_gather": 1}
    assert backward == {"all_reduce": 6 * LAYERS + 1}


def bytes_sent(member, tokens, sequence):
    model = build("llama", {"vocab_size": 128})
    batch = batch_of(model, "causal", tokens)
    with replica(member, Grid(tensor=member.size)) as mesh:
        cut_tensor(model, mesh, sequence=sequence)
        token_loss(model, batch).backward()
        return mesh.tally.bytes, batch.count


@pytest.mark.parametrize("sequence", [False, True])
def test_bytes_and_places_of_collectives(pool, sequence):
    sent, targets = pool.run(bytes_sent, 2, 12, sequence)[0]
    hidden_bytes = 2 * 12 * 32 * 8
    for layer in range(LAYERS):
        for region, way_out in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            entrance = f"model.layers.{layer}.{region}"
            exit = f"{entrance}.{way_out}"
            if sequence:  # a gather sends this rank's piece, a reduction the whole
                assert sent["all_gather", "tensor", entrance] == sent["all_gather", "tensor", exit] == hidden_bytes / 2
                assert sent["reduce_scatter", "tensor", entrance] == hidden_bytes
                assert sent["reduce_scatter", "tensor", exit] == hidden_bytes
            else:
                assert sent["all_reduce", "tensor", entrance] == sent["all_reduce", "tensor", exit] == hidden_bytes
    assert sent["all_gather", "tensor", "cross_entropy"] == 3 * targets * 8  # three numbers a target
