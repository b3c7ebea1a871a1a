import shutil

import pytest
import torch
from torch.nn import functional as F

from paceline.config import ModelConfig
from paceline.errors import PlanError
from paceline.models import fused_attention, kernels
from paceline.models.attention import attend, choose
from paceline.models.fused_attention import fits, require
from paceline.models.fused_attention import fused_attention as attention
from paceline.models.source import ModelSource
from tolerances import BF16_ATTENTION

has_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the kernel is compiled here: no g++")
SHAPES = [  # batch, query heads, key/value heads, queries, keys, width of a query, of a value, causal
    (2, 6, 2, 301, 301, 64, 64, True),
    (1, 4, 1, 7, 7, 16, 16, True),
    (2, 2, 2, 128, 128, 8, 8, True),
    (2, 4, 4, 130, 257, 64, 32, False),
    (1, 2, 2, 1, 5, 8, 8, False),
]


def llama(implementation="auto"):
    """With fewer key/value heads than query heads."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    return ModelSource.of(ModelConfig(config={"model_type": "llama", **sizes}, attention=implementation), "causal")


def tensors(batch, heads, groups, queries, keys, width, value_width):
    """As projections give them: the heads of a position lie together."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    query, key = drawn(batch, queries, heads, width), drawn(batch, keys, groups, width)
    value, grad = drawn(batch, keys, groups, value_width), drawn(batch, queries, heads, value_width)
    return [x.transpose(1, 2).requires_grad_() for x in (query, key, value)], grad


def results(compute, inputs, grad):
    output = compute(*inputs)
    return [output, *torch.autograd.grad(output, inputs, grad)]


@has_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_fp64_but_for_the_rounding_of_bf16(shape):
    *sizes, causal = shape
    require("a test")
    inputs, grad = tensors(*sizes)
    found = results(lambda *x: attention(*x, causal=causal, scale=0.2), inputs, grad)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = results(
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=causal, enable_gqa=True, scale=0.2).transpose(1, 2),
        doubles,
        grad.double(),
    )
    for name, own, other in zip(("output", "query", "key", "value"), found, expected, strict=True):
        assert float((own.detach().double() - other.detach()).norm() / other.detach().norm()) < BF16_ATTENTION, name


@has_compiler
def test_threads_change_nothing(monkeypatch):
    require("a test")
    inputs, grad = tensors(3, 4, 2, 150, 150, 16, 16)
    alone = results(lambda *x: attention(*x, causal=True, scale=0.3), inputs, grad)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    together = results(lambda *x: attention(*x, causal=True, scale=0.3), inputs, grad)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@has_compiler
def test_what_is_no_number_stays_so_and_harms_no_other_head():
    require("a test")
    (query, key, value), _ = tensors(1, 2, 2, 9, 9, 8, 8)
    query.data[0, 1, 4, 0] = torch.nan
    output_QNV = attention(query, key, value, causal=True, scale=0.3)[0]
    assert output_QNV[4, 1].isnan().all()
    output_QNV[4, 1] = 0.0
    assert output_QNV.isfinite().all()


@has_compiler
def test_great_scores_do_not_overflow():
    require("a test")
    (query, key, value), _ = tensors(1, 1, 1, 40, 40, 8, 8)
    output = attention(query * 100, key * 100, value, causal=True, scale=1.0)
    expected = F.scaled_dot_product_attention(query.double() * 100, key.double() * 100, value.double(), is_causal=True)
    torch.testing.assert_close(output.double(), expected.transpose(1, 2), rtol=0.0, atol=0.05)


@has_compiler
def test_rows_that_are_not_dense_are_copied():
    require("a test")
    (query, key, value), _ = tensors(1, 2, 2, 9, 9, 8, 8)
    wide = [x.detach().mT.contiguous().mT for x in (query, key, value)]
    assert all(x.stride(-1) != 1 for x in wide)
    assert torch.equal(attention(*wide, causal=True, scale=0.3), attention(query, key, value, causal=True, scale=0.3))


@has_compiler
def test_torch_can_compile_around_it():
    require("a test")
    inputs, _ = tensors(1, 4, 2, 9, 9, 8, 8)
    for operator, arguments in (
        (torch.ops.paceline.fused_attention.default, (*inputs, True, 0.3)),
        (
            torch.ops.paceline.fused_attention_backward.default,
            (
                torch.ones(1, 9, 4, 8).bfloat16(),
                *inputs,
                torch.ones(1, 9, 4, 8).bfloat16(),
                torch.ones(1, 4, 9),
                True,
                0.3,
            ),
        ),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("dtype", "width", "fitting"),
    [(torch.bfloat16, 8, True), (torch.bfloat16, 7, False), (torch.float32, 8, False)],
)
def test_what_fits(dtype, width, fitting):
    x = torch.zeros(1, 2, 3, width, dtype=dtype)
    assert fits(x, x, x) is fitting


@has_compiler
def test_a_model_gets_it_where_it_is_compiled_and_calls_it_without_a_mask_only(monkeypatch):
    model = llama().build(0, dtype=torch.bfloat16)
    assert choose(model, dtype=torch.bfloat16, device=torch.device("cpu"), compiled=True)
    assert model.config._attn_implementation == "fused"
    calls = []
    monkeypatch.setattr(
        fused_attention, "fused_attention", lambda *x, **options: calls.append(options) or attention(*x, **options)
    )
    ids = torch.arange(2, 22)[None]
    plain = model(ids, use_cache=False).logits
    assert [options["causal"] for options in calls] == [True] * 2
    model.set_attn_implementation("matmul")
    torch.testing.assert_close(plain, model(ids, use_cache=False).logits, rtol=0.05, atol=0.05)
    model.set_attn_implementation("fused")
    masked = model(ids, attention_mask=torch.tensor([[0] * 3 + [1] * 17]), use_cache=False).logits
    assert len(calls) == 2 and masked.shape == plain.shape


def test_what_does_not_fit_is_computed_by_matmul():
    (query, key, value), _ = tensors(1, 4, 2, 9, 9, 8, 8)
    module = torch.nn.Module()
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"softcap": 2.0})):
        given = [x.to(dtype) for x in (query, key, value)]
        own, _ = attend("fused", module, *given, None, **options)
        other, _ = attend("matmul", module, *given, None, **options)
        assert torch.equal(own, other)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernels.library.cache_clear()
    with pytest.raises(PlanError, match=r"model.attention=fused needs a C\+\+ compiler, and there is no no-such-compi"):
        llama("fused").build(0)


@has_compiler
def test_what_the_compiler_says_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    broken = tmp_path / "broken.cpp"
    broken.write_text("int broken = ;")
    with pytest.raises(PlanError, match=r"a setting: g\+\+ cannot compile broken.cpp: .*error: expected"):
        kernels.library(broken, "a setting")
    assert not list(tmp_path.glob("broken-*/*"))


@has_compiler
def test_a_library_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    assert kernels.library(source, "a setting").one() == 1
    kernels.library.cache_clear()
    monkeypatch.setattr("paceline.data.cache._finish", lambda *_: pytest.fail("compiled again"))
    assert kernels.library(source, "a setting").one() == 1
