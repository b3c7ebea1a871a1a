"""Tiny models that are cut over the tensor axis, and their comparison with one process, in fp64."""

from collections import Counter

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

from meshes import replica
from paceline.models.attention import register
from paceline.models.heads import auto_class
from paceline.models.tiny import TINY
from paceline.objectives.base import Batch, token_loss
from paceline.objectives.vocabulary import gather_logits
from paceline.parallel.held import take
from paceline.parallel.tensor import cut_tensor
from paceline.plan.layout import Grid
from tolerances import FP64_EQUAL

norm = torch.linalg.vector_norm

SHAPE = {
    "vocab_size": 127,
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "head_dim": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 10}
FAMILIES = {name: (head, {**options, "vocab_size": 127}) for name, (head, options) in TINY.items()} | {
    "olmo2": ("causal", {**SHAPE, "model_type": "olmo2", "num_key_value_heads": 2}),
    "opt": ("causal", {**SHAPE, "model_type": "opt", "ffn_dim": 50, "word_embed_proj_dim": 32}),
    "gpt_bigcode": ("causal", {**TINY["gpt2"][1], "model_type": "gpt_bigcode"}),
    "bloom": ("causal", {"model_type": "bloom", "vocab_size": 127, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt_oss": (
        "causal",
        {**SHAPE, **GROUPED, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "granitemoe": (
        "causal",
        {
            **SHAPE,
            "model_type": "granitemoe",
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": ("causal", {**SHAPE, **EXPERTS, "model_type": "qwen3_moe", "num_key_value_heads": 2}),
    "deepseek_v3": (
        "causal",
        {
            **SHAPE,
            **LATENT,
            **ROUTED,
            "model_type": "deepseek_v3",
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
        },
    ),
}
NO_DROPOUT = (
    "dropout",
    "hidden_dropout",
    "activation_dropout",
    "attention_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)


def build(family, changes=None, attention=None):
    """An fp64 model, every parameter at a random value that matters."""
    head, options = FAMILIES[family]
    options = {**options, "tie_word_embeddings": family not in ("llama", "phi3"), "pad_token_id": 1, **(changes or {})}
    config = AutoConfig.for_model(options.pop("model_type"), **options, bos_token_id=2, eos_token_id=3)
    for name in NO_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    register()
    model = auto_class(head).from_config(config, attn_implementation=attention, experts_implementation="eager").double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.train()


def batch_of(model, head, tokens):
    """Two rows, of which some positions have no target, and one row is padded where a mask can say so."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size

    def ids(positions):
        return torch.randint(vocabulary, (2, positions), generator=generator)

    inputs = {"input_ids": ids(tokens)}
    positions = tokens
    if head != "causal":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, -4:] = 0
    if head == "seq2seq":
        positions = tokens - 4
        inputs["decoder_input_ids"] = ids(positions)
    labels = ids(positions)
    labels[0, :3] = labels[1, -1] = -100
    return Batch(inputs=inputs, labels=labels, count=2 * positions - 4, sequences=(0, 1))


def counts(tally):
    """Calls by kind since the last time."""
    found = Counter()
    for (kind, axis, _), calls in tally.calls.items():
        assert axis == "tensor"
        found[kind] += calls
    tally.clear()
    return dict(found)


class InDouble(TorchFunctionMode):
    """Families that compute norms or routing in fp32 whatever their dtype do it in fp64: the parts of a gradient, each
    rounded to fp32, would not add up to the whole rounded once."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = Tensor.double if func is Tensor.float else func
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def compare(member, family, tokens, sequence, changes, attention):
    """What differs most on this rank from one process, and the collectives each way."""
    with InDouble():
        return compare_in_double(member, family, tokens, sequence, changes, attention)


def compare_in_double(member, family, tokens, sequence, changes, attention):
    head = FAMILIES[family][0]
    whole, model = build(family, changes, attention), build(family, changes, attention)
    batch = batch_of(whole, head, tokens)
    expected_loss = token_loss(whole, batch)
    expected_loss.backward()
    expected = dict(whole.named_parameters())
    floor = 1e-5 * norm(torch.stack([norm(parameter.grad) for parameter in expected.values()]))  # a key's bias has none
    with replica(member, Grid(tensor=member.size)) as mesh:
        held = cut_tensor(model, mesh, sequence=sequence)
        loss = token_loss(model, batch)
        forward = counts(mesh.tally)
        loss.backward()
        backward = counts(mesh.tally)
        errors = {"loss": abs(float(loss.detach() / expected_loss.detach()) - 1)}
        squares = torch.zeros((), dtype=torch.float64)
        assert [name for name, _ in model.named_parameters()] == list(expected)
        for name, parameter in model.named_parameters():
            gradient, reference, part = parameter.grad, expected[name].grad, held.get(name)
            if part is not None and part.summed_over is not None:
                gradient = part.summed_over.all_reduce(gradient.clone())
            for cut in part.cuts if part is not None else ():
                reference = take(reference, cut.dim, cut.runs, parameter.shape[cut.dim])
            errors[name] = float(norm(gradient - reference) / torch.maximum(norm(expected[name].grad), floor))
            if part.is_owner if part is not None else mesh.tensor.index == 0:
                squares += norm(gradient) ** 2
        total = norm(torch.stack([norm(parameter.grad) for parameter in expected.values()]))
        errors["norm"] = abs(float(mesh.tensor.all_reduce(squares).sqrt() / total) - 1)
        with torch.no_grad():
            logits = gather_logits(model, model.eval()(**batch.inputs).logits)
            errors["logits"] = float(norm(logits - whole.eval()(**batch.inputs).logits) / norm(logits))
    worst = max(errors, key=errors.get)
    return worst, errors[worst], forward, backward


def check_equal(pool, ranks, family, *, tokens=12, sequence=False, changes=None, attention=None):
    results = pool.run(compare, ranks, family, tokens, sequence, changes, attention)
    for worst, error, _, _ in results:
        assert error <= FP64_EQUAL, (worst, error)
    return results[0][2:]
