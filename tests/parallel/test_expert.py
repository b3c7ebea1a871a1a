from collections import Counter

import pytest
import torch
from torch import nn

from meshes import replica
from paceline.comm.mesh import Axis, Mesh, Tally
from paceline.errors import PlanError
from paceline.objectives.base import Batch, token_loss
from paceline.parallel.expert import check_experts, cut_experts, find_experts
from paceline.parallel.held import take
from paceline.parallel.recompute import recompute
from paceline.parallel.tensor import cut_tensor
from paceline.plan.layout import Grid
from paceline.verify.double import in_double
from parallel.tensor_models import batch_of, build, norm
from tolerances import FP64_EQUAL

LAYERS, TOKENS, WIDTH, CHOICES, EXPERTS = 2, 12, 32, 2, 4


def rows(batch, index):
    """One row of a batch."""
    inputs = {"input_ids": batch.inputs["input_ids"][index : index + 1], "use_cache": False}
    return Batch(inputs=inputs, labels=batch.labels[index : index + 1], count=0, sequences=(index,))


def first_experts_only(model):
    """Every token chooses experts 0 and 1, which are the first rank's."""
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module.register_forward_hook(lambda _, __, out: (*out[:2], torch.arange(2).expand_as(out[2])))


def compare(member, family, starved, again):
    """What differs most on this rank, which has one of two rows, from one process with both."""
    with in_double(), replica(member, Grid(shard=member.size, expert=member.size)) as mesh:
        whole, model = build(family), build(family)
        if starved:
            first_experts_only(whole)
            first_experts_only(model)
        batch = batch_of(whole, "causal", TOKENS)
        expected_loss = token_loss(whole, batch)
        expected_loss.backward()
        held = cut_experts(model, mesh, {})
        if again:
            recompute(model, "full")
        loss = token_loss(model, rows(batch, mesh.shard.index))
        loss.backward()
        total = mesh.states.all_reduce(loss.detach().clone())
        errors = {"loss": abs(float(total / expected_loss.detach()) - 1)}
        squares = torch.zeros((), dtype=torch.float64)
        for name, parameter in model.named_parameters():
            reference = full = whole.get_parameter(name).grad
            gradient = parameter.grad
            if name in held:
                for cut in held[name].cuts:
                    reference = take(reference, cut.dim, cut.runs, parameter.shape[cut.dim])
            else:
                gradient = mesh.states.all_reduce(gradient.clone())
            errors[name] = float(norm(gradient - reference) / norm(full))
            squares += float(name in held or mesh.shard.index == 0) * norm(gradient) ** 2
        squares = mesh.states.all_reduce(squares)
        errors["norm"] = abs(float(squares.sqrt() / norm(torch.stack([norm(p.grad) for p in whole.parameters()]))) - 1)
    worst = max(errors, key=errors.get)
    return worst, errors[worst]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_every_gradient_is_that_of_one_process(pool, family, again):
    for worst, error in pool.run(compare, 2, family, False, again):
        assert error <= FP64_EQUAL, (worst, error)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_rank_whose_experts_nobody_chose_takes_part(pool, family):
    for worst, error in pool.run(compare, 2, family, True, False):
        assert error <= FP64_EQUAL, (worst, error)


def sent(member):
    """Calls and bytes, forward and backward."""
    with replica(member, Grid(shard=member.size, expert=member.size)) as mesh:
        model = build("mixtral")
        cut_experts(model, mesh, {})
        loss = token_loss(model, rows(batch_of(model, "causal", TOKENS), mesh.shard.index))
        forward = Counter(mesh.tally.calls), Counter(mesh.tally.bytes)
        mesh.tally.clear()
        loss.backward()
        return forward, (Counter(mesh.tally.calls), Counter(mesh.tally.bytes))


def test_collectives_and_their_bytes(pool):
    """Counts, then every chosen row there and back, each way."""
    results = pool.run(sent, 2)
    row_bytes = TOKENS * CHOICES * WIDTH * 8
    for layer in range(LAYERS):
        place = ("all_to_all", "expert", f"model.layers.{layer}.mlp.experts")
        for forward, backward in results:
            assert forward[0][place] == 3 and backward[0][place] == 2
        there_and_back = [sum(way[1][place] for way in ways) for ways in zip(*results, strict=True)]
        assert there_and_back == [2 * (2 * row_bytes + EXPERTS * 8), 2 * 2 * row_bytes]
    assert all(
        sum(calls.values()) == n * LAYERS for ways in results for (calls, _), n in zip(ways, (3, 2), strict=True)
    )


def in_bf16(member):
    with replica(member, Grid(shard=member.size, expert=member.size)) as mesh:
        whole, model = build("mixtral").bfloat16(), build("mixtral").bfloat16()
        batch = batch_of(whole, "causal", TOKENS)
        cut_experts(model, mesh, {})
        loss = token_loss(model, rows(batch, mesh.shard.index))
        loss.backward()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.bfloat16}
        return float(mesh.states.all_reduce(loss.detach().clone()) / token_loss(whole, batch).detach())


def test_bf16_stays_bf16(pool):
    assert pool.run(in_bf16, 2) == [pytest.approx(1, abs=2**-8)] * 2


def evaluated(member):
    with replica(member, Grid(shard=member.size, expert=member.size)) as mesh, torch.no_grad():
        whole, model = build("mixtral").eval(), build("mixtral").eval()
        cut_experts(model, mesh, {})
        inputs = rows(batch_of(whole, "causal", TOKENS), mesh.shard.index).inputs
        return float((model(**inputs).logits - whole(**inputs).logits).abs().max())


def test_evaluation(pool):
    assert max(pool.run(evaluated, 2)) <= FP64_EQUAL


def mesh(size=2, index=0, tensor=1, tensor_index=0, states=2):
    alone = {name: Axis(name=name) for name in ("pipeline", "shard", "context", "world")}
    return Mesh(
        **alone,
        tensor=Axis(name="tensor", index=tensor_index, size=tensor),
        states=Axis(name="states", size=states),
        expert=Axis(name="expert", index=index, size=size),
        states_mesh=None,
        tally=Tally(),
    )


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_the_ranks_parts_are_the_whole(family, tensor):
    """Every value of every expert is held, and counted once: also where tensor ranks hold the same (biases; all of
    granitemoe's experts)."""
    whole = dict(build(family).named_parameters())
    counted = {name: torch.zeros_like(parameter) for name, parameter in whole.items() if "experts" in name}
    for rank in range(2 * tensor):
        one = mesh(index=rank // tensor, tensor=tensor, tensor_index=rank % tensor)
        model = build(family)
        held = cut_tensor(model, one)
        dealt = cut_experts(model, one, held)
        assert dealt.keys() == counted.keys()
        assert [name for name, _ in model.named_parameters()] == list(whole)
        for name, part in dealt.items():
            assert part.full_shape == whole[name].shape
            local, marks = whole[name], torch.ones_like(whole[name])
            for cut in part.cuts:
                size = model.get_parameter(name).shape[cut.dim]
                local = take(local, cut.dim, cut.runs, size)
            assert torch.equal(model.get_parameter(name), local), name
            if part.is_owner:
                view = counted[name]
                for cut in part.cuts:
                    rest = [i for run in cut.runs for i in range(run.start, run.start + run.size)]
                    other = sorted(set(range(view.shape[cut.dim])) - set(rest))
                    marks.index_fill_(cut.dim, torch.tensor(other, dtype=torch.int64), 0.0)
                view += marks
    for name, times in counted.items():
        assert torch.equal(times, torch.ones_like(times)), name


class Weighted(nn.Module):
    """Experts that weigh what enters them, and bend it then."""

    def __init__(self):
        super().__init__()
        self.num_experts = EXPERTS
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, dtype=torch.float64))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return (hidden_states.unsqueeze(1) * top_k_weights.unsqueeze(-1) * self.up[top_k_index]).tanh().sum(1)


def weighted():
    model = build("mixtral")
    model.model.layers[1].mlp.experts = Weighted()
    return model


def with_a_scale():
    model = build("mixtral")
    model.model.layers[1].mlp.experts.scale = nn.Parameter(torch.ones(3))
    return model


def with_an_expert_that_is_none():
    """A choice beyond the experts, which the family leaves out."""
    model = build("mixtral")
    model.model.layers[1].mlp.gate.register_forward_hook(
        lambda _, __, out: (*out[:2], torch.full_like(out[2], EXPERTS))
    )
    return model


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (lambda: build("llama"), 2, r"layout.expert=2: LlamaForCausalLM has no module of experts .* Use expert=1"),
        (lambda: build("mixtral"), 3, r"=3 does not divide the 4 experts of model.layers.0.mlp.experts. Use expert=2"),
        (with_a_scale, 2, r"layers.1.mlp.experts, a MixtralExperts, has parameters of shapes .*\(3,\).*num_experts=4"),
        (weighted, 2, r"model.layers.1.mlp.experts, a Weighted, makes something else of tokens"),
        (with_an_expert_that_is_none, 2, r"model.layers.1.mlp.experts, a MixtralExperts, makes something else"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(model, size, message):
    model = model()
    with pytest.raises(PlanError, match=message):
        check_experts(model, batch_of(model, "causal", TOKENS), mesh(size, states=6))


def test_trying_leaves_a_model_as_it_was():
    model = build("mixtral")
    model.model.layers[0].eval()
    check_experts(model, batch_of(model, "causal", TOKENS), mesh())
    assert not model.model.layers[0].training and model.model.layers[1].training
    assert [module.num_experts for module in find_experts(model).values()] == [EXPERTS] * LAYERS
    assert not any(module._forward_hooks for module in find_experts(model).values())


def test_without_the_axis_nothing_is_dealt_out():
    model = build("mixtral")
    forwards = [module.forward for module in find_experts(model).values()]
    assert cut_experts(model, mesh(size=1), {}) == {}
    assert [module.forward for module in find_experts(model).values()] == forwards
