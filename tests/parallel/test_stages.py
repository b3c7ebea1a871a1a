"""A model cut into stages that run one after the other in this process, against the same model whole; fp64."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from paceline.comm.mesh import Axis, Mesh
from paceline.errors import ModelError, PlanError
from paceline.objectives.base import logits_of, token_loss
from paceline.parallel.slots import StageOutput
from paceline.parallel.stages import cut_stages
from pipelines import FAMILIES, batch_of, build
from tolerances import FP64_EQUAL

norm = torch.linalg.vector_norm


def pipeline(index, size):
    """The mesh of one rank of a pipeline, as far as a cut without weights shared by a part of its ranks needs it."""
    alone = {name: Axis(name=name) for name in ("shard", "context", "tensor", "states", "world")}
    axis = Axis(name="pipeline", index=index, size=size)
    return Mesh(pipeline=axis, states_mesh=None, tally=axis.tally, **alone)


def cut(model, head="causal", size=2, schedule="1f1b"):
    """The parts of all ranks."""
    sample = batch_of(head, 99, 5)
    return [cut_stages(copy.deepcopy(model), pipeline(i, size), schedule=schedule, sample=sample) for i in range(size)]


def run(parts, batch):
    """Loss of the stages, one after the other; gradients are left in the parts."""
    received, borders = (), []
    for stage, rank in enumerate(parts[0].schedule.ranks):
        part = parts[rank]
        with part.at(stage, received):
            try:
                loss = token_loss(part.model, batch)
            except StageOutput as output:
                received = tuple(tensor.detach().requires_grad_() for tensor in output.tensors)
                borders.append((output.tensors, received))
    loss.backward()
    for handed, taken in reversed(borders):
        learning = [(tensor, copy.grad) for tensor, copy in zip(handed, taken, strict=True) if tensor.requires_grad]
        torch.autograd.backward(*zip(*learning, strict=True))
    return loss.detach()


CASES = [(family, schedule) for family in FAMILIES for schedule in ("1f1b", "interleaved1f1b", "zbv")]


@pytest.mark.parametrize(("family", "schedule"), CASES, ids=["-".join(case) for case in CASES])
def test_stages_give_loss_and_gradients_of_the_whole_model(family, schedule):
    head, model = FAMILIES[family][0], build(family, 5)
    batch = batch_of(head, 1)
    parts = cut(model, head, schedule=schedule)
    loss = run(parts, batch)
    expected = token_loss(model, batch)
    expected.backward()
    assert abs(float(loss / expected.detach()) - 1) <= FP64_EQUAL
    floor = 1e-5 * norm(torch.stack([norm(parameter.grad) for parameter in model.parameters()]))
    for name, parameter in model.named_parameters():
        gradient = sum(part.model.get_parameter(name).grad for part in parts if name not in part.elsewhere)
        error = norm(gradient - parameter.grad) / torch.maximum(norm(parameter.grad), floor)
        assert error <= FP64_EQUAL, f"{name} differs by {error:.3g}"


def test_a_rank_holds_its_blocks_under_their_names_and_nothing_else():
    model = build("llama", 5, tie_word_embeddings=False)
    whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
    first, last = cut(model)
    assert first.blocks == {0: ("model.layers.0", "model.layers.1", "model.layers.2")}
    assert last.blocks == {1: ("model.layers.3", "model.layers.4")}
    own = [dict(part.model.named_parameters()) for part in (first, last)]
    assert own[0].keys() | own[1].keys() == whole.keys() and not own[0].keys() & own[1].keys()
    assert {name for name in own[1] if "layers" not in name} == {"model.norm.weight", "lm_head.weight"}
    for part, parameters in zip((first, last), own, strict=True):
        assert part.elsewhere == whole.keys() - parameters.keys() and not part.held
        assert all(torch.equal(parameter, whole[name]) for name, parameter in parameters.items())
    assert (first.has_loss, last.has_loss) == (False, True)
    names = [name.partition("layers.")[2].partition(".")[0] for name in own[1] if "layers" in name]
    assert sorted(set(names)) == ["3", "4"]


def test_no_memory_is_kept_for_what_is_elsewhere():
    _, last = cut(build("llama", 4, tie_word_embeddings=False))
    embedding = last.model.model.embed_tokens.weight
    assert embedding.shape == (128, 32) and embedding.untyped_storage().nbytes() == 8 and embedding.isnan().all()
    skeleton = last.model.model.layers[0]
    assert skeleton.self_attn.head_dim == 8 and skeleton.self_attn.q_proj.weight.is_meta


def test_a_tied_table_is_held_twice_and_counted_once():
    first, last = cut(build("llama", 4, tie_word_embeddings=True))
    for part, is_owner in ((first, True), (last, False)):
        (name,) = part.held
        held = part.held[name]
        assert name == "model.embed_tokens.weight" and held.full_shape == (128, 32)
        assert held.summed_over.size == 2 and held.is_owner == is_owner
    assert last.model.lm_head.weight is last.model.model.embed_tokens.weight


def test_a_tied_table_whose_ends_are_on_one_rank_is_one_parameter():
    first, other = cut(build("llama", 4, tie_word_embeddings=True), schedule="zbv")
    assert first.own == (0, 3) and other.own == (1, 2) and not first.held and not other.held
    assert first.model.lm_head.weight is first.model.model.embed_tokens.weight
    assert "model.embed_tokens.weight" in other.elsewhere


def test_the_head_counts_when_blocks_are_dealt_out():
    first, last = cut(build("llama", 6, vocab_size=2000))
    assert len(first.blocks[0]) > len(last.blocks[1])


def test_a_stage_uses_only_what_its_result_depends_on():
    first, last = cut(build("bert", 4), "masked")
    names = {id(p): name for part in (first, last) for name, p in part.model.named_parameters()}
    used = [{names[id(p)] for p in part.parameters(stage)} for part, stage in ((first, 0), (last, 1))]
    assert used[0] & used[1] == {"bert.embeddings.word_embeddings.weight"}
    assert "bert.embeddings.position_embeddings.weight" in used[0] and "cls.predictions.bias" in used[1]


def test_blocks_that_are_shared_by_all_layers_are_held_by_all_stages():
    first, last = cut(build("albert", 5), "masked")
    assert first.blocks[0] == last.blocks[1] == ("albert.encoder.albert_layer_groups.0",)
    shared = [name for name in first.held if "albert_layer_groups" in name]
    assert len(shared) == 16 and all(first.held[n].is_owner and not last.held[n].is_owner for n in shared)


def test_what_a_stage_does_not_have_is_nan():
    """Were a wrong tensor used, the loss would not be a number."""
    _, last = cut(build("llama", 4))
    with last.at(1, [torch.full((2, 7, 32), torch.nan, dtype=torch.float64)]):
        assert token_loss(last.model, batch_of("causal", 1)).isnan()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Plain(nn.Module):
    """A module of the user's own; ``around`` is what its head adds to the last hidden state."""

    def __init__(self, around="nothing", scale=False):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(16, 8)
        self.scale = nn.Linear(8, 8) if scale else None
        self.layers = nn.ModuleList([Block() for _ in range(4)])
        self.head = nn.Linear(8, 16)
        self.around = around

    def forward(self, input_ids):
        x = embedded = self.table(input_ids)
        states = []
        for layer in self.layers:
            x = layer(x if self.scale is None else x * torch.sigmoid(self.scale(embedded)))
            states.append(x)
        if self.around == "first block":
            x = x + states[0]
        if self.around == "embedding":
            x = x + embedded
        return self.head(x)


def plain_batch():
    batch = batch_of("causal", 3)
    ids = batch.inputs["input_ids"] % 16
    return replace(batch, inputs={"input_ids": ids}, labels=ids.roll(-1, 1))


def cut_plain(model):
    return [cut_stages(copy.deepcopy(model), pipeline(i, 2), schedule="1f1b", sample=plain_batch()) for i in range(2)]


@pytest.mark.parametrize("model", [Plain(), Plain("embedding"), Plain(scale=True)], ids=["plain", "residual", "scale"])
def test_a_weight_that_reaches_several_stages_is_summed_over_them(model):
    model = copy.deepcopy(model).double()
    parts = cut_plain(model)
    loss = run(parts, plain_batch())
    expected = token_loss(model, plain_batch())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=FP64_EQUAL, atol=0)
    assert ("table.weight" in parts[1].held) == (model.around == "embedding" or model.scale is not None)
    for name, parameter in model.named_parameters():
        gradients = [part.model.get_parameter(name).grad for part in parts if name not in part.elsewhere]
        assert (len(gradients) == 2) == (name in parts[0].held)
        torch.testing.assert_close(sum(gradients), parameter.grad, rtol=FP64_EQUAL, atol=1e-15)


def test_what_goes_round_the_blocks_is_refused():
    with pytest.raises(
        PlanError, match=r"pipeline=2: Plain has something that goes round its blocks .* Use pipeline=1"
    ):
        cut_plain(Plain("first block"))


class AsksForDtype(Plain):
    """As many families do, of its first parameter."""

    def forward(self, input_ids):
        dtype = next(self.parameters()).dtype
        return super().forward(input_ids).to(dtype)


def test_a_stage_in_the_middle_has_parameters_to_ask_for_their_dtype():
    parts = [cut_stages(AsksForDtype(), pipeline(i, 2), schedule="zbv", sample=plain_batch()) for i in range(2)]
    with parts[1].at(1, [torch.ones(2, 7, 8)]), pytest.raises(StageOutput):
        logits_of(parts[1].model, plain_batch().inputs)
    assert {name.partition(".")[0] for name, _ in parts[1].model.named_parameters()} == {"layers"}


class Remembering(Plain):
    """Its third block looks for what the first one left in a map."""

    def forward(self, input_ids):
        x, found = self.table(input_ids), {}
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == 0 and not x.isnan().any():
                found["first"] = x
            if number == 2:
                x = x + found["first"]
        return self.head(x)


def test_a_stage_that_does_not_run_alone_is_refused():
    with pytest.raises(PlanError, match=r"Remembering does not run from layers.3 on \(KeyError: 'first'\)"):
        cut_plain(Remembering())


def test_a_weight_of_blocks_in_two_stages_is_refused():
    model = Plain()
    model.layers[3].linear.weight = model.layers[0].linear.weight
    with pytest.raises(
        PlanError, match=r"layers\.0\.linear\.weight, .* of Plain is shared by blocks of several stages"
    ):
        cut_plain(model)


def test_fewer_blocks_than_stages_are_refused():
    with pytest.raises(PlanError, match=r"schedule=zbv makes 4 stages, but LlamaForCausalLM calls 3 blocks"):
        cut(build("llama", 3), schedule="zbv")


def test_blocks_skipped_at_random_are_refused():
    with pytest.raises(PlanError, match=r"layerdrop=0\.1 skips blocks at random"):
        cut(build("opt", 4, layerdrop=0.1))


class Fickle(Plain):
    """Leaves its last block out if it is told to."""

    def forward(self, input_ids, short=False):
        x = self.table(input_ids)
        for layer in self.layers[: 3 if short else 4]:
            x = layer(x)
        return self.head(x)


def test_a_model_that_calls_other_blocks_than_when_it_was_cut_is_noticed():
    _, last = cut_plain(Fickle())
    with pytest.raises(ModelError, match="called 3 blocks; expected 4"), last.at(1, [torch.ones(2, 7, 8)]):
        logits_of(last.model, plain_batch().inputs | {"short": True})


def test_measuring_leaves_modes_and_flags_as_they_were():
    model = build("llama", 4)
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    first, last = cut(model)
    assert not first.model.model.layers[0].training and first.model.model.layers[1].training
    assert {n for n, p in last.model.named_parameters() if not p.requires_grad} == {"model.norm.weight"}
