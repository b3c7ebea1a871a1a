"""Attention between parts of a sequence, tile by tile, against attention over the whole."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from meshes import replica
from paceline.comm.mesh import Axis
from paceline.models.chance import fold, taken
from paceline.parallel import partial_attention, visible
from paceline.parallel.partial_attention import Scores
from paceline.parallel.ring import attend, ring_attention, ring_spans
from paceline.parallel.ulysses import repeats, ulysses_attention, ulysses_spans
from paceline.parallel.visible import Tile, Visible
from paceline.plan.layout import Grid
from tolerances import FP64_EQUAL

TOKENS = 24
ALL = slice(0, TOKENS)
ALONE = Axis(name="context")


def causal(batch, head, query, key):
    return key <= query


def window(batch, head, query, key):
    return (key <= query) & (key > query - 5)


def chunked(batch, head, query, key):
    return (key <= query) & (key // 6 == query // 6)


def both_ways(batch, head, query, key):
    return query >= 0


def near(batch, head, query, key):
    return (query - key).abs() <= 3


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 12 + [2] * 7, [0] * 20 + [-1] * 4])
KINDS = {
    "causal": {"sees": causal, "causal": True, "reach": None},
    "window": {"sees": window, "causal": True, "reach": 5},
    "chunked": {"sees": chunked, "causal": True, "reach": 6},
    "both ways": {"sees": both_ways, "causal": False, "reach": None},
    "near": {"sees": near, "causal": False, "reach": 3},
}


def visible_of(kind, documents):
    return Visible(
        **KINDS[kind],
        documents=DOCUMENTS if documents else None,
        tokens=TOKENS,
        device=torch.device("cpu"),
    )


def expected_mask(kind, documents):
    """(B|1, 1, T, T), written out without any tiles."""
    position = torch.arange(TOKENS)
    row, column = position[None, None, :, None], position[None, None, None, :]
    if not documents:
        return KINDS[kind]["sees"](0, 0, row, column).expand(1, 1, TOKENS, TOKENS)
    start = torch.stack([torch.tensor([int((d == d[i]).nonzero()[0]) for i in range(TOKENS)]) for d in DOCUMENTS])
    inner = position - start
    seen = KINDS[kind]["sees"](0, 0, inner[:, None, :, None], inner[:, None, None, :])
    same = DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None, :]
    return seen & same & (DOCUMENTS >= 0)[:, None, None, :]


def reference(query, key, value, mask, scores, sinks=None):
    """Attention as it is defined; a query that sees nothing gives 0."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    products = query @ key.mT * scores.scale
    if scores.softcap:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    products = products.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        beside = sinks[:, None, None].expand(*products.shape[:3], 1)
        return torch.cat([products, beside], -1).softmax(-1)[..., :-1] @ value
    blind = ~mask.any(-1, keepdim=True)
    return products.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0) @ value


def tensors(heads=4, key_heads=2, width=8, value_width=8, dtype=torch.float64, tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, width), (key_heads, width), (key_heads, value_width), (heads, value_width)
    return [torch.randn(2, n, tokens, e, generator=generator, dtype=torch.float64).to(dtype) for n, e in shapes]


def with_gradients(function, query, key, value, grad):
    given = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    output = function(*given)
    output.backward(grad)
    return [output.detach(), *(x.grad for x in given)]


def assert_close(found, expected, tolerance):
    for name, a, b in zip(("output", "query", "key", "value"), found, expected, strict=True):
        error = torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double())
        assert error <= tolerance, f"{name} differs by {float(error):.3g}"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in a part and several blocks in a tile, the last ones short."""
    monkeypatch.setattr(visible, "TILE_TOKENS", 5)
    monkeypatch.setattr(partial_attention, "BLOCK_ROWS", 3)


@pytest.mark.parametrize("size", [1, 3, 6, 12])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_hold_every_visible_pair_once_and_no_hidden_tile(kind, documents, size):
    """Pieces of 12, 4, 2 and 1 positions."""
    kinds, mask = visible_of(kind, documents), expected_mask(kind, documents)
    parts = [ring_spans(TOKENS, size, index) for index in range(size)]
    places = [torch.cat([torch.arange(span.start, span.stop) for span in part]) for part in parts]
    seen = torch.zeros(2, 1, TOKENS, TOKENS, dtype=torch.int)
    for asker, asked in itertools.product(range(size), range(size)):
        for tile in kinds.tiles(parts[asker], parts[asked]):
            rows, columns = places[asker][tile.rows], places[asked][tile.columns]
            ones = torch.ones(2, 1, len(rows), len(columns), dtype=torch.int)
            ones = ones if tile.mask is None else ones * tile.mask
            ones = ones.tril() if tile.causal else ones
            assert ones.any(), "a tile in which no query sees any key"
            seen[:, :, rows[:, None], columns] += ones
    assert torch.equal(seen, mask.expand_as(seen).int())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_head_tail_pieces_give_every_rank_the_same_work(size):
    parts = [ring_spans(TOKENS, size, index) for index in range(size)]
    assert sorted(p for part in parts for span in part for p in range(span.start, span.stop)) == list(range(TOKENS))
    kind = visible_of("causal", False)
    work = {
        (asker, asked): sum(
            (tile.rows.stop - tile.rows.start) * (tile.columns.stop - tile.columns.start) / (2 if tile.causal else 1)
            for tile in kind.tiles(parts[asker], parts[asked])
        )
        for asker in range(size)
        for asked in range(size)
    }
    assert len({work[rank, (rank - hop) % size] for hop in range(1, size) for rank in range(size)}) <= 1
    assert len({work[rank, rank] for rank in range(size)}) == 1


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_on_one_rank_equal_the_whole(kind, softcap, documents):
    query, key, value, grad = tensors()
    scores = Scores(scale=0.4, softcap=softcap)
    mask = expected_mask(kind, documents)
    whole = [slice(0, TOKENS)]
    kinds = visible_of(kind, documents)
    found = with_gradients(lambda *x: attend(*x, None, kinds, scores, ALONE, whole, [whole]), query, key, value, grad)
    expected = with_gradients(lambda *x: reference(*x, mask, scores), query, key, value, grad)
    assert_close(found, expected, FP64_EQUAL)


def on_ranks(member, kind, documents, attention, heads, widths, tile_tokens):
    """This rank's outputs and gradients, what they should be, and what was sent."""
    visible.TILE_TOKENS = tile_tokens
    with replica(member, Grid(context=member.size)) as mesh:
        query, key, value, grad = tensors(*heads, *widths)
        scores = Scores(scale=0.4)
        run, spans = (ring_attention, ring_spans) if attention == "ring" else (ulysses_attention, ulysses_spans)
        places = torch.cat([torch.arange(s.start, s.stop) for s in spans(TOKENS, member.size, member.index)])
        kinds = visible_of(kind, documents)
        own = [x[:, :, places] for x in (query, key, value, grad)]
        found = with_gradients(lambda *x: run(*x, None, visible=kinds, scores=scores, axis=mesh.context), *own)
        mask = expected_mask(kind, documents)
        whole = with_gradients(lambda *x: reference(*x, mask, scores), query, key, value, grad)
        return found, [x[:, :, places] for x in whole], dict(mesh.tally.calls), dict(mesh.tally.bytes)


HEADS = [(4, 4), (4, 2), (4, 1)]


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("kind", "documents"), [("causal", False), ("window", False), ("near", True)])
@pytest.mark.parametrize("heads", HEADS)
def test_ranks_equal_the_whole(pool, heads, kind, documents, ranks, attention):
    for found, expected, _, _ in pool.run(on_ranks, ranks, kind, documents, attention, heads, (8, 8), 4):
        assert_close(found, expected, FP64_EQUAL)


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_values_of_another_width_than_keys(pool, attention):
    for found, expected, _, _ in pool.run(on_ranks, 2, "causal", False, attention, (4, 2), (8, 6), 4):
        assert_close(found, expected, FP64_EQUAL)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_messages_of_ring_attention(pool, ranks, heads):
    """Keys and values c - 1 times each way; their gradients c times."""
    _, key_heads = heads
    message = 2 * key_heads * (TOKENS // ranks) * (8 + 6) * 8
    for _, _, calls, n_bytes in pool.run(on_ranks, ranks, "causal", False, "ring", heads, (8, 6), 4):
        where = ("rotate", "context", "attention")
        assert calls == {where: 3 * ranks - 2}
        assert n_bytes == {where: (3 * ranks - 2) * message}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_messages_of_ulysses_attention(pool, ranks, heads):
    """Queries, keys and values in one all-to-all, outputs in another; backward the same."""
    n_heads, key_heads = heads
    copied = max(key_heads, ranks)
    positions = 2 * (TOKENS // ranks) * 8
    for _, _, calls, n_bytes in pool.run(on_ranks, ranks, "causal", False, "ulysses", heads, (8, 6), 4):
        where = ("all_to_all", "context", "attention")
        assert calls == {where: 4}
        assert n_bytes == {where: 2 * positions * (n_heads * 8 + copied * (8 + 6) + n_heads * 6)}


def test_dropout_leaves_the_rest_of_a_softmax_alone():
    """It takes probabilities of the whole sequence, as one rank's: parts of attention are weighed without it."""
    query, key, value, grad = tensors()
    chance = torch.randint(1 << 62, query.shape[:2], generator=torch.Generator().manual_seed(1))
    scores = Scores(scale=0.4, dropout=0.25, chance_BN=chance)
    positions = torch.arange(TOKENS)
    keep = taken(fold(chance.unsqueeze(-1), positions), positions, 0.25).logical_not().double() / 0.75
    mask = expected_mask("causal", False)

    def expected(query, key, value):
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        return ((query @ key.mT * 0.4).masked_fill(~mask, float("-inf")).softmax(-1) * keep) @ value

    spans = ring_spans(TOKENS, 3, 1)
    places = torch.cat([positions[span] for span in spans])
    visible = visible_of("causal", False)

    def own(query, key, value):
        return attend(query[:, :, places], key, value, None, visible, scores, ALONE, spans, [visible.whole])

    found = with_gradients(own, query, key, value, grad[:, :, places])
    part = with_gradients(lambda *x: expected(*x)[:, :, places], query, key, value, grad[:, :, places])
    assert_close(found, part, FP64_EQUAL)


def test_key_heads_are_repeated_only_until_they_divide():
    assert [repeats(8, 8, 4), repeats(8, 2, 4), repeats(8, 1, 4), repeats(12, 6, 4), repeats(24, 6, 4)] == [
        1,
        2,
        4,
        2,
        2,
    ]


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_fused_kernels_and_plain_products_agree(monkeypatch, is_causal, is_fused):
    query, key, value, grad = tensors()
    scores = Scores(scale=0.4)
    tile = Tile(rows=ALL, columns=ALL, query=ALL, key=ALL, causal=is_causal)
    mask = expected_mask("causal" if is_causal else "both ways", False)
    assert partial_attention._is_fused(query, value, scores, tile)
    if not is_fused:
        monkeypatch.setattr(partial_attention, "_is_fused", lambda *_: False)
    output, lse = partial_attention.forward(query, key, value, scores, tile)
    gradients = partial_attention.backward(grad, query, output, lse, key, value, scores, tile)
    expected = with_gradients(lambda *x: reference(*x, mask, scores), query, key, value, grad)
    assert_close([output, *gradients], expected, FP64_EQUAL)


def test_on_cuda_fused_kernels_are_given_what_they_take():
    """By their own shape functions, without a device: what they compute is not seen here."""
    with FakeTensorMode():
        query, key, value, grad = (
            torch.empty(2, heads, TOKENS, 8, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2, 4)
        )
        tile = Tile(rows=ALL, columns=ALL, query=ALL, key=ALL, causal=True)
        scores = Scores(scale=0.4)
        with Kernels() as kernels:
            output, lse = partial_attention.forward(query, key, value, scores, tile)
            grads = partial_attention.backward(grad, query, output, lse, key, value, scores, tile)
        assert (output.shape, lse.shape) == (query.shape, query.shape[:3])
        assert [x.shape for x in grads] == [x.shape for x in (query, key, value)]
    assert {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"} <= kernels.names
    assert not kernels.names & {"bmm", "baddbmm"}


class Kernels(TorchDispatchMode):
    """Which of aten's operators were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("kind", ["causal", "window"])
def test_bf16_is_as_exact_as_its_inputs(kind, softcap):
    """Scores of tens, which bf16 would round by a tenth, against fp64 from the same inputs."""
    query, key, value, grad = tensors(dtype=torch.bfloat16)
    scores = Scores(scale=4.0, softcap=softcap)
    exact = [x.double() for x in (query, key, value, grad)]
    mask = expected_mask(kind, False)
    whole = [slice(0, TOKENS)]
    kinds = visible_of(kind, False)
    found = with_gradients(lambda *x: attend(*x, None, kinds, scores, ALONE, whole, [whole]), query, key, value, grad)
    expected = with_gradients(lambda *x: reference(*x, mask, scores), *exact)
    assert_close(found, expected, 0.02)


def with_sinks(member, attention):
    """This rank's part of the output, and the sum over ranks of the gradients of sinks; and what they should be."""
    with replica(member, Grid(context=member.size)) as mesh:
        run, spans = (ring_attention, ring_spans) if attention == "ring" else (ulysses_attention, ulysses_spans)
        query, key, value, grad = tensors()
        places = torch.cat([torch.arange(s.start, s.stop) for s in spans(TOKENS, member.size, member.index)])
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
        scores, kinds = Scores(scale=0.4), visible_of("window", True)
        own = [x[:, :, places] for x in (query, key, value)]
        output = run(*own, sinks, visible=kinds, scores=scores, axis=mesh.context)
        output.backward(grad[:, :, places])
        expected = reference(query, key, value, expected_mask("window", True), scores, sinks)
        (expected_grad,) = torch.autograd.grad(expected, sinks, grad)
        found = output.detach(), mesh.context.all_reduce(sinks.grad)
        return found, (expected.detach()[:, :, places], expected_grad)


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_sinks_take_a_share_of_every_softmax_and_learn(pool, attention):
    for found, expected in pool.run(with_sinks, 4, attention):
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=FP64_EQUAL, atol=FP64_EQUAL)
