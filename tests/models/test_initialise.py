"""First values are a function of (seed, module name) alone."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from paceline.config import ModelConfig
from paceline.errors import ModelError
from paceline.models.describe import count, describe
from paceline.models.heads import auto_class
from paceline.models.initialise import initialise, initialise_missing, materialise
from paceline.models.source import ModelSource
from paceline.models.tiny import TINY


def tiny(family):
    head, config = TINY[family]
    return ModelSource.of(ModelConfig(config=config), head)


def plain(source, seed=0):
    """The model as transformers itself builds and fills it."""
    torch.manual_seed(seed)
    return auto_class(source.head).from_config(source.hugging_face_config(), dtype=torch.float32)


def inputs(source, rows=4, tokens=24):
    ids = torch.randint(0, source.vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(5))
    batch = {"input_ids": ids, "use_cache": False}
    if source.head == "seq2seq":
        batch["decoder_input_ids"] = ids[:, :16]
    if source.head == "masked":
        del batch["use_cache"]
    return batch


def gradients(model, source):
    model(**inputs(source)).logits.float().square().sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture(params=TINY)
def source(request):
    return tiny(request.param)


def test_values_depend_on_the_seed_and_on_nothing_else(source):
    torch.manual_seed(1)
    first = source.build(7).state_dict()
    torch.manual_seed(2)
    torch.rand(100)
    again, other = source.build(7).state_dict(), source.build(8).state_dict()
    assert first.keys() == again.keys() == plain(source).state_dict().keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_everything_is_filled_and_tied_as_the_family_does(source):
    built, reference = source.build(7), plain(source)
    for name, tensor in [*built.named_parameters(), *built.named_buffers()]:
        assert tensor.device.type == "cpu", name
        assert not tensor.isnan().any(), name
    for (name, buffer), (_, expected) in zip(built.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    assert describe(built) == describe(reference)


def test_values_are_distributed_as_the_family_does(source):
    built, reference = source.build(7), dict(plain(source).named_parameters())
    for name, parameter in built.named_parameters():
        mean, deviation = reference[name].mean().item(), reference[name].std().item()
        assert parameter.mean().item() == pytest.approx(
            mean, abs=max(6 * deviation / math.sqrt(parameter.numel()), 1e-7)
        )
        assert parameter.std().item() == pytest.approx(deviation, rel=0.25), name


def test_the_same_parameters_get_gradients_as_in_the_plain_model(source):
    built = gradients(source.build(7), source)
    assert built == gradients(plain(source), source)
    assert len(built) > 8


@pytest.mark.parametrize("family", [family for family, (head, _) in TINY.items() if head == "causal"])
def test_the_first_loss_is_that_of_a_uniform_guess(family):
    source = tiny(family)
    model = source.build(7).eval()
    batch = inputs(source)
    with torch.no_grad():
        logits = model(**batch).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(source.vocabulary), abs=0.25)


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("llama", ["model.layers.1", "model.layers.0", "model.norm", "model.embed_tokens", "model.rotary_emb"]),
        ("gpt2", ["transformer.h.1", "transformer.wpe", "transformer.h.0"]),
        ("gemma2", ["model.layers.1", "model.embed_tokens"]),
        ("mixtral", ["model.layers.1", "model.layers.0.mlp.experts"]),
        ("bert", ["cls", "bert.encoder.layer.1", "bert.embeddings"]),
        ("albert", ["albert.encoder.albert_layer_groups.0"]),
        ("t5", ["decoder.block.1", "encoder.block.0", "encoder"]),
    ],
)
def test_a_block_made_alone_equals_the_block_of_the_whole_model(family, blocks):
    source = tiny(family)
    whole, bare = source.build(7), source.meta()
    for name in blocks:
        block = bare.get_submodule(name).to_empty(device="cpu")
        torch.rand(3)
        initialise(block, 7, name=name, owner=bare)
        expected = whole.get_submodule(name).state_dict()
        tied = {alias for info in describe(whole) for alias in info.aliases}
        for key, value in block.state_dict().items():
            assert f"{name}.{key}" in tied or torch.equal(value, expected[key]), f"{name}.{key}"


def test_the_number_of_threads_changes_no_value():
    class Orthogonal(nn.Linear):
        def reset_parameters(self):
            nn.init.orthogonal_(self.weight)

    before, weights = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = nn.Sequential(Orthogonal(32, 131))
        initialise(model, 0)
        assert torch.get_num_threads() == threads
        weights.append(model[0].weight.detach())
    torch.set_num_threads(before)
    assert torch.equal(*weights)


def test_the_random_state_of_the_caller_is_untouched():
    linear = nn.Linear(3, 3)
    before = torch.get_rng_state()
    tiny("gpt2").build(7)
    initialise(linear, 7)
    assert torch.equal(before, torch.get_rng_state())


class Plain(nn.Module):
    """A user's module: order of children, an own parameter, a tied head."""

    def __init__(self, names, tied=False):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.5))
        makers = {
            "embed": lambda: nn.Embedding(16, 8),
            "mix": lambda: nn.MultiheadAttention(8, 2),
            "norm": lambda: nn.LayerNorm(8),
            "head": lambda: nn.Linear(8, 16, bias=False),
            "extra": lambda: nn.Linear(8, 8),
        }
        for name in names:
            self.add_module(name, makers[name]())
        if tied:
            self.head.weight = self.embed.weight


def filled(names, seed=3, **options):
    module = Plain(names, **options)
    initialise(module, seed)
    return module.state_dict()


def test_a_plain_module_is_filled_by_name_whatever_else_it_holds():
    few, many = filled(["embed", "mix", "norm"]), filled(["extra", "norm", "mix", "head", "embed"])
    assert all(torch.equal(few[name], many[name]) for name in few)
    assert not torch.equal(few["embed.weight"], filled(["embed"], seed=4)["embed.weight"])
    assert not torch.equal(many["extra.weight"][:, 0], many["head.weight"][:8, 0])


def test_direct_parameters_of_a_plain_module_keep_their_values():
    assert torch.equal(filled(["embed"])["scale"], torch.full((3,), 2.5))


def test_a_tied_parameter_takes_the_value_of_its_first_holder():
    alone, tied = filled(["embed"]), filled(["embed", "head"], tied=True)
    assert torch.equal(alone["embed.weight"], tied["embed.weight"])
    module = Plain(["embed", "head"], tied=True)
    initialise(module, 3)
    assert module.head.weight is module.embed.weight


def test_tensors_that_transformers_marked_as_filled_are_filled_again():
    source = tiny("llama")
    model = AutoModelForCausalLM.from_config(source.hugging_face_config())
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    initialise(model, 7)
    expected = source.build(7).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_only_missing_parameters_are_filled_when_asked_so():
    source = tiny("bert")
    model, expected = source.build(1), source.build(7).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialise_missing(model, 7, {"cls.predictions.transform.dense.weight"})
    for name, value in model.state_dict().items():
        wanted = expected if name == "cls.predictions.transform.dense.weight" else before
        assert torch.equal(value, wanted[name]), name
    assert not any(hasattr(tensor, "_is_hf_initialized") for tensor in model.parameters())


def test_a_parameter_that_no_rule_covers_is_an_error():
    model = tiny("llama").meta()
    model.model.norm.strange = nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ModelError, match=r"does not say how to initialise model\.norm\.strange\."):
        materialise(model, 7)


def test_describe_names_each_tied_parameter_once():
    infos = {info.name: info for info in describe(tiny("gpt2").meta())}
    assert infos["transformer.wte.weight"].aliases == ("lm_head.weight",)
    assert infos["transformer.wte.weight"].shape == (128, 32)
    assert "lm_head.weight" not in infos
    module = Plain(["embed", "head"], tied=True)
    module.scale.requires_grad_(False)
    assert count(module) == 128 + 3
    assert count(module, trainable_only=True) == 128
