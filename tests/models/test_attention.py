import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from paceline.config import ModelConfig
from paceline.errors import ModelError
from paceline.models import blockwise
from paceline.models.attention import choose, register
from paceline.models.blockwise import attention
from paceline.models.chance import taken
from paceline.models.source import ModelSource
from tolerances import FP64_EQUAL

VOCABULARY = 64
SEQUENCE = 40
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 11},
    # A cap on the scores and a window in every other layer; a cap near the scores bends them.
    "gemma2": {**GROUPED, "sliding_window": 11, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": SHAPE,
    "bert": SHAPE,
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}
FALCON = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
NO_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate", "hidden_dropout_prob")
NO_DROPOUT += ("attention_probs_dropout_prob",)
CLASSES = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a sequence, the last one short."""
    monkeypatch.setattr(blockwise, "BLOCK_ROWS", 7)
    register()


def build(family, implementation, dtype=torch.float64):
    config = AutoConfig.for_model(family, **COMMON | FAMILIES[family])
    for name in NO_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    model = CLASSES.get(family, AutoModelForCausalLM).from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # scores far enough from 0 to matter
            parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
    return model.to(dtype).train()


def inputs(case, family):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (3, SEQUENCE), generator=generator)
    given = {"input_ids": ids, "use_cache": False}
    if case == "documents":
        given["position_ids"] = torch.cat([torch.arange(15), torch.arange(24), torch.arange(1)]).expand(3, -1)
    if case == "padding":
        lengths = torch.tensor([SEQUENCE, 25, 9])
        given["attention_mask"] = (torch.arange(SEQUENCE) < lengths[:, None]).long()
    if family == "t5":
        given["decoder_input_ids"] = ids[:, :17]
    if family == "bert":
        del given["use_cache"]
    return given


def logits_and_gradients(model, given):
    logits = model(**given).logits
    if "attention_mask" in given and logits.shape[1] == SEQUENCE:  # what a padding position gives means nothing
        logits = logits * given["attention_mask"][..., None]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
    model.zero_grad()
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=FP64_EQUAL, atol=FP64_EQUAL)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=FP64_EQUAL, atol=FP64_EQUAL, msg=name)


CASES = [(family, case) for family in FAMILIES for case in ("plain", "padding")]
CASES += [(family, "documents") for family in ("llama", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox")]


@pytest.fixture
def exact(monkeypatch):
    """Eager attention takes its softmax in fp32, whatever the model is in: here in the model's own dtype."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda scores, dim, **_: softmax(scores, dim))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("family", "case"), CASES)
def test_logits_and_every_gradient_equal_those_of_eager_attention(family, case):
    given = inputs(case, family)
    assert_equal(
        logits_and_gradients(build(family, "matmul"), given), logits_and_gradients(build(family, "eager"), given)
    )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_generation_with_a_cache_gives_what_whole_sequences_give(family):
    model = build(family, "matmul").eval()
    prompt = torch.randint(2, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0  # padding on the left
    cached = model.generate(prompt, attention_mask=mask, **options)
    whole = build(family, "eager").eval().generate(prompt, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, whole)


def test_a_cache_of_fixed_length_gives_what_whole_sequences_give():
    model = build("llama", "matmul").eval()
    prompt = torch.randint(2, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    fixed = model.generate(prompt, cache_implementation="static", disable_compile=True, **options)
    whole = build("llama", "eager").eval().generate(prompt, use_cache=False, **options)
    assert torch.equal(fixed, whole)


def heads(dtype, queries=50, keys=50, batch=2, n=6, k=2, width=16, value=12, spread=1.0):
    generator = torch.Generator().manual_seed(4)
    shapes = ((batch, n, queries, width), (batch, k, keys, width), (batch, k, keys, value))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(x * s).to(dtype).requires_grad_() for x, s in zip(made, (spread, 1.0, 1.0), strict=True)]


def plain(query, key, value, *, bias=None, keep=None, scale):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scale
    if bias is not None:
        hidden = ~bias if bias.dtype is torch.bool else bias == float("-inf")
        scores = (scores if bias.dtype is torch.bool else scores + bias).masked_fill(hidden, -1e30)
    chances = scores.softmax(-1)
    if bias is not None:
        chances = chances.masked_fill(hidden, 0.0)
    return ((chances if keep is None else chances * keep) @ value).transpose(1, 2)


def compare(output, expected, learning):
    torch.testing.assert_close(output, expected, rtol=FP64_EQUAL, atol=FP64_EQUAL)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=output.dtype)
    for got, wanted in zip(
        torch.autograd.grad((output * weights).sum(), learning),
        torch.autograd.grad((expected * weights).sum(), learning),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=FP64_EQUAL, atol=FP64_EQUAL)


def test_queries_that_see_nothing_give_zero_and_hidden_keys_get_no_gradient():
    query, key, value = heads(torch.float64, queries=30, keys=45)
    sees = torch.rand(2, 1, 30, 45, generator=torch.Generator().manual_seed(6)) < 0.4
    sees[0, :, :9] = False  # a whole block and a part of the next
    sees[1, :, 20] = False
    sees[..., 11:14] = False
    output = attention(query, key, value, bias=sees, scale=0.3)
    (gradient,) = torch.autograd.grad(output.sum(), key, retain_graph=True)
    compare(output, plain(query, key, value, bias=sees, scale=0.3), [query, key, value])
    assert torch.count_nonzero(output[0, :9]) == torch.count_nonzero(output[1, 20]) == 0
    assert torch.count_nonzero(gradient[:, :, 11:14]) == 0


@pytest.mark.parametrize("shape", [(1, 6, 50, 50), (2, 1, 50, 50), (2, 6, 50, 50)])
def test_a_bias_that_learns_gets_its_gradient(shape):
    query, key, value = heads(torch.float64)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).requires_grad_()
    compare(
        attention(query, key, value, bias=bias, scale=0.3),
        plain(query, key, value, bias=bias, scale=0.3),
        [query, key, value, bias],
    )


def test_a_bias_under_a_causal_mask():
    query, key, value = heads(torch.float64)
    bias = torch.randn(1, 6, 50, 50, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    bias[..., 10, :20] = float("-inf")  # so that query 10 sees none of what came before it
    past = torch.ones(50, 50, dtype=torch.bool).tril()
    both = bias.masked_fill(~past, float("-inf"))
    compare(
        attention(query, key, value, bias=bias, causal=True, scale=0.3),
        plain(query, key, value, bias=both, scale=0.3),
        [query, key, value],
    )


def test_dropout_takes_the_same_probabilities_forward_and_backward():
    query, key, value = heads(torch.float64, queries=20, keys=40, n=4, k=4, value=40)
    identity = torch.eye(40, dtype=torch.float64).expand(2, 4, 40, 40)
    torch.manual_seed(9)
    chances = attention(query, key, identity, scale=0.3, dropout=0.25).transpose(1, 2)  # values that show them
    keep = chances / (query @ key.mT * 0.3).softmax(-1)
    assert set(keep.detach().mul(0.75).round(decimals=9).flatten().tolist()) == {0.0, 1.0}
    assert abs(float((keep == 0).double().mean()) - 0.25) < 0.02
    torch.manual_seed(9)
    output = attention(query, key, value, scale=0.3, dropout=0.25)
    compare(output, plain(query, key, value, keep=keep.detach(), scale=0.3), [query, key, value])


@pytest.mark.parametrize("rows", [7, 128])
def test_dropout_follows_from_chance_and_the_number_of_the_key(monkeypatch, rows):
    """In blocks of whatever size, that leave out keys."""
    monkeypatch.setattr(blockwise, "BLOCK_ROWS", rows)
    query, key, value = heads(torch.float64)
    chance = torch.randint(1 << 62, query.shape[:3], generator=torch.Generator().manual_seed(1))
    keep = taken(chance, torch.arange(key.shape[2]), 0.25).logical_not().double() / 0.75
    past = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    compare(
        attention(query, key, value, bias=past[None, None], scale=0.3, dropout=0.25, chance_BNQ=chance),
        plain(query, key, value, bias=past, keep=keep, scale=0.3),
        [query, key, value],
    )


@pytest.mark.parametrize("spread", [1.0, 4.0, 16.0])
def test_bf16_is_as_exact_as_with_fp32_scores(spread):
    query, key, value = heads(torch.bfloat16, n=2, k=2, width=64, value=64, spread=spread)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # fp32 scores
        theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    ours = attention(query, key, value, causal=True, scale=64**-0.5).transpose(1, 2)

    def gradients(output):
        return torch.autograd.grad(output.sum(), (query, key, value), retain_graph=True)

    for mine, other, right in zip(
        (ours, *gradients(ours)), (theirs, *gradients(theirs)), (exact, *gradients(exact)), strict=True
    ):
        assert (mine - right).norm() < 2.5 * (other - right).norm()


def test_keys_that_no_query_of_a_block_sees_are_left_out(monkeypatch):
    multiplied = []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: multiplied.append(a.shape[1] * a.shape[2]) or product(a, b))
    query, key, value = heads(torch.float32, queries=49, keys=49, n=2)

    def scores(**options):
        multiplied.clear()
        with torch.no_grad():
            attention(query, key, value, scale=1.0, **options)
        return sum(multiplied)

    position = torch.arange(49)
    window = (position[:, None] >= position) & (position[:, None] - position < 7)
    assert scores() == 49 * 49
    assert scores(causal=True) == 7 * 7 * (1 + 2 + 3 + 4 + 5 + 6 + 7)
    assert scores(bias=window[None, None]) == 7 * (7 + 6 * 13)


@pytest.mark.parametrize("bias", [None, "learns"])
def test_the_operator_is_well_formed(bias):
    given = heads(torch.float64, queries=20, keys=20)
    if bias:
        bias = torch.randn(1, 6, 20, 20, dtype=torch.float64).requires_grad_()
    torch.library.opcheck(blockwise._attention, (*given, bias, None, bias is None, 0.3, 0.0, 0.0))


def test_nothing_of_the_size_of_the_scores_is_kept_for_the_backward_pass():
    query, key, value = heads(torch.bfloat16, queries=300, keys=300)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attention(query, key, value, causal=True, scale=0.3).sum()
    assert 0 < max(kept) <= max(x.numel() for x in (query, key, value)) < 300 * 300


def source(family, attention="auto", **settings):
    return ModelSource.of(
        ModelConfig(config={"model_type": family, **COMMON, **settings}, attention=attention), "causal"
    )


@pytest.mark.parametrize(
    ("family", "settings", "dtype", "chosen"),
    [
        ("llama", GROUPED, torch.bfloat16, True),
        ("llama", GROUPED, torch.float32, False),
        ("gpt2", FAMILIES["gpt2"], torch.bfloat16, True),
        ("gemma2", FAMILIES["gemma2"], torch.bfloat16, False),  # runs eager of itself, for the cap
        ("falcon", FALCON, torch.bfloat16, False),  # an attention of its own
        ("gpt_oss", GROUPED, torch.bfloat16, False),  # sinks
    ],
)
def test_auto_is_matmul_in_bf16_on_a_cpu_where_a_family_would_run_sdpa(family, settings, dtype, chosen):
    model = source(family, **settings).meta()
    before = model.config._attn_implementation
    assert choose(model, dtype=dtype, device=torch.device("cpu"), compiled=False) is chosen
    assert model.config._attn_implementation == ("matmul" if chosen else before)
    assert not choose(model, dtype=dtype, device=torch.device("cuda"), compiled=False)


def test_asked_for_by_name_it_runs():
    model = source("llama", "matmul", **GROUPED).build(0)
    assert model.config._attn_implementation == "matmul"
    names = []
    logits = model(torch.arange(2, 22)[None]).logits
    pending = [logits.grad_fn]
    while pending:
        node = pending.pop()
        names.append(node.name())
        pending += [function for function, _ in node.next_functions if function is not None]
    assert any("paceline_attention" in name for name in names)


@pytest.mark.parametrize(("family", "named"), [("falcon", "FalconForCausalLM"), ("bloom", "BloomForCausalLM")])
def test_asked_for_by_name_of_a_family_with_an_attention_of_its_own_it_is_refused(family, named):
    with pytest.raises(ModelError, match=f"{named} has an attention of its own, which cannot be replaced"):
        source(family, "matmul").meta()


def test_attention_sinks_are_refused():
    model = source("gpt_oss", "matmul", **GROUPED).build(0)
    with pytest.raises(ModelError, match="does not compute s_aux, which GptOssAttention asks for"):
        model(torch.from_numpy(np.arange(2, 12))[None])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
def test_compiled_it_is_part_of_one_graph_with_the_same_gradients():
    given = inputs("padding", "mistral")
    model = build("mistral", "matmul")
    expected = logits_and_gradients(model, given)
    counter = CompileCounterWithBackend("aot_eager")
    model.model.layers[0].compile(backend=counter, fullgraph=True)
    assert_equal(logits_and_gradients(model, given), expected)
    assert counter.frame_count == 1
