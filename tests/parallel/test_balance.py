import pytest
import torch
from transformers.models.mixtral import modeling_mixtral

from meshes import replica
from paceline.comm.mesh import Axis, Mesh
from paceline.errors import ModelError, PlanError
from paceline.objectives.base import Batch, token_loss
from paceline.parallel.balance import Balance, balanced, check_routers
from paceline.parallel.held import Held
from paceline.parallel.recompute import recompute
from paceline.plan.layout import Grid
from parallel.tensor_models import batch_of, build, norm
from tolerances import FP32_LOSS, FP64_EQUAL

COEFFICIENT, TOKENS, EXPERTS, CHOICES = 0.5, 12, 4, 2
ASKED = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}


class Summed:
    """An objective of which only the loss is used."""

    def loss(self, model, batch):
        return token_loss(model, batch)


def made(family="mixtral", mesh=None, sequence=False, **changes):
    """A model and its objective, with the balance loss; two rows, of uneven numbers of targets."""
    model = build(family, {**ASKED, **changes})
    batch = batch_of(model, "causal", TOKENS)
    return model, batch, balanced(model, Summed(), batch, mesh or Mesh.alone(), sequence=sequence)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_near(some, others, tolerance=FP64_EQUAL):
    for name, gradient in some.items():
        assert norm(gradient - others[name]) <= tolerance * norm(gradient), name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_of_one_sequence_it_is_the_loss_of_transformers(family):
    """Theirs takes a mask where ours takes targets; it is in fp32."""
    model, batch, objective = made(family)
    one = Batch(inputs={"input_ids": batch.inputs["input_ids"][:1]}, labels=batch.labels[:1], count=9, sequences=(0,))
    loss = objective.loss(model, one)
    has_target = one.labels != -100
    output = model(**one.inputs, output_router_logits=True)
    theirs = modeling_mixtral.load_balancing_loss_func(output.router_logits, EXPERTS, CHOICES, has_target)
    expected = token_loss(model, one) + COEFFICIENT * has_target.sum() * theirs
    assert loss.item() == pytest.approx(expected.item(), rel=FP32_LOSS)
    assert_near(gradients(model, loss), gradients(model, expected), 1e-5)
    assert float(theirs.detach()) > 1, "it matters"


def test_the_losses_of_rows_add_up_whatever_they_meet_and_are_filled_with():
    model, batch, objective = made()
    ids, labels = (
        torch.nn.functional.pad(x, (0, 5), value=v) for x, v in ((batch.inputs["input_ids"], 7), (batch.labels, -100))
    )
    whole = objective.loss(model, Batch(inputs={"input_ids": ids}, labels=labels, count=0, sequences=(0,)))
    rows = [
        Batch(
            inputs={"input_ids": batch.inputs["input_ids"][i : i + 1]},
            labels=batch.labels[i : i + 1],
            count=0,
            sequences=(0,),
        )
        for i in range(2)
    ]
    parts = sum(objective.loss(model, row) for row in rows)
    assert whole.item() == pytest.approx(parts.item(), rel=FP64_EQUAL)
    assert_near(gradients(model, whole), gradients(model, parts))


def test_a_row_without_targets_counts_for_nothing():
    model, batch, objective = made()
    batch.labels.fill_(-100)
    loss = objective.loss(model, batch)
    assert loss.item() == 0 and all(not gradient.any() for gradient in gradients(model, loss).values())


def test_recompute_counts_once():
    model, batch, objective = made()
    expected = gradients(model, objective.loss(model, batch))
    assert recompute(model, "full") == 2
    assert_near(expected, gradients(model, objective.loss(model, batch)))


def test_in_evaluation_the_loss_is_that_of_the_targets():
    model, batch, objective = made()
    assert objective.loss(model, batch).item() > token_loss(model, batch).item() + 1
    model.eval()
    assert objective.loss(model, batch).item() == token_loss(model, batch).item()


def test_a_model_that_does_not_ask_for_it_keeps_its_objective():
    model, objective = build("mixtral"), Summed()
    assert balanced(model, objective, batch_of(model, "causal", TOKENS), Mesh.alone(), sequence=False) is objective


def test_the_model_is_left_as_it_was_but_for_its_own_loss():
    model, _, objective = made()
    assert model.training and not model.config.output_router_logits
    assert [router for router, _ in objective.outlets] == [layer.mlp.gate for layer in model.model.layers]


def parts_over(member, axis):
    """Positions cut over an axis: the loss that all ranks report, and the gradient of logits, put together."""
    logits = torch.randn(2, 2 * TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.zeros(2, TOKENS, dtype=torch.int64)
    labels[0, :5] = labels[1, 9:] = -100
    settings = {"coefficient": COEFFICIENT, "choices": CHOICES}
    alone = {"context": Axis(name="context"), "sequence": Axis(name="tensor")}
    whole = logits.clone().requires_grad_()
    expected = Balance(**settings, **alone).loss(whole.unbind(0), labels)
    expected.backward()
    with replica(member, Grid(**{axis: member.size})) as mesh:
        line = getattr(mesh, axis)
        own = [line.piece(part.view(2, TOKENS, EXPERTS), 1).flatten(0, 1).clone().requires_grad_() for part in logits]
        given = {**alone, "context" if axis == "context" else "sequence": line}
        loss = Balance(**settings, **given).loss(own, line.piece(labels, 1) if axis == "context" else labels)
        loss.backward()
        total = line.all_reduce(loss.detach().clone()) if axis == "context" else loss.detach()
        pieces = [line.piece(part.view(2, TOKENS, EXPERTS), 1).flatten(0, 1) for part in whole.grad]
        apart = max(float((part.grad - piece).abs().max()) for part, piece in zip(own, pieces, strict=True))
        return apart, abs(float(total / expected.detach()) - 1)


@pytest.mark.parametrize("axis", ["context", "tensor"])
def test_positions_cut_over_ranks(pool, axis):
    for apart, error in pool.run(parts_over, 2, axis):
        assert apart <= FP64_EQUAL and error <= FP64_EQUAL


def test_a_pipeline_is_refused():
    stages = Mesh.alone()
    object.__setattr__(stages, "pipeline", Axis(name="pipeline", size=2))
    with pytest.raises(
        PlanError, match=r"layout.pipeline=2: output_router_logits=true .* Use output_router_logits=false"
    ):
        made(mesh=stages)


def test_compiled_blocks_are_refused():
    model = build("mixtral", ASKED)
    with pytest.raises(PlanError, match=r"train\.compile=true with output_router_logits=true"):
        balanced(model, Summed(), batch_of(model, "causal", 12), Mesh.alone(), sequence=False, compiled=True)


def test_a_family_without_such_a_loss_is_refused():
    with pytest.raises(PlanError, match="DeepseekV3ForCausalLM has no balance loss"):
        made("deepseek_v3")


def test_a_family_that_does_not_say_how_much_it_counts_is_refused(monkeypatch):
    model = build("mixtral", ASKED)
    del model.router_aux_loss_coef, model.config.router_aux_loss_coef
    monkeypatch.delattr(type(model.config), "router_aux_loss_coef")  # the default
    with pytest.raises(PlanError, match="MixtralForCausalLM does not say its router_aux_loss_coef"):
        balanced(model, Summed(), batch_of(model, "causal", TOKENS), Mesh.alone(), sequence=False)


def test_a_family_with_another_loss_is_refused(monkeypatch):
    theirs = modeling_mixtral.load_balancing_loss_func
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *given: theirs(*given) - 1)
    model = build("mixtral", ASKED)
    with pytest.raises(PlanError, match=r"balance loss of MixtralForCausalLM is .*, so it is another one"):
        balanced(model, Summed(), batch_of(model, "causal", TOKENS), Mesh.alone(), sequence=False)


def test_logits_of_other_positions_are_refused():
    alone = {"context": Axis(name="context"), "sequence": Axis(name="tensor")}
    with pytest.raises(ModelError, match=r"logits of shape \(5, 4\) for 2 rows of 3 positions"):
        Balance(coefficient=1.0, choices=2, **alone).loss([torch.zeros(5, 4)], torch.zeros(2, 3, dtype=torch.int64))


def test_a_router_with_a_part_of_its_gradient_is_refused():
    model, _, objective = made()
    mesh = Mesh.alone()
    name = next(name for name, _ in model.named_parameters() if name.endswith("gate.weight"))
    held = {name: Held(full_shape=(4, 32), summed_over=mesh.tensor)}
    with pytest.raises(PlanError, match=f"but of {name} each has a part of the gradient"):
        check_routers(objective, model, held, mesh)
    check_routers(objective, model, {}, mesh)
    check_routers(Summed(), model, held, mesh)
