import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.objectives import cross_entropy
from paceline.objectives.cross_entropy import summed_cross_entropy


@pytest.fixture
def case(monkeypatch):
    """Logits (B, S, V) over several chunks, the last one short, and labels of which some are no target."""

    def make(dtype, shape=(2, 45, 8000), chunk=1 << 18):
        monkeypatch.setattr(cross_entropy, "CPU_CHUNK", chunk)
        generator = torch.Generator().manual_seed(0)
        chunk_rows = cross_entropy.CPU_CHUNK // shape[-1]
        assert 0 < shape[0] * shape[1] % chunk_rows < chunk_rows < shape[0] * shape[1]
        logits = (torch.randn(shape, generator=generator) * 3).to(dtype).requires_grad_()
        labels = torch.randint(shape[-1], shape[:-1], generator=generator)
        labels[0, ::3] = -100
        return logits, labels

    return make


def reference(logits, labels):
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_value_and_gradient_equal_the_plain_form(case, dtype, rtol):
    logits, labels = case(dtype)
    total = summed_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(total * 0.37, logits)
    expected = reference(logits, labels)
    (expected_gradient,) = torch.autograd.grad(expected * 0.37, logits)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected_gradient, rtol=rtol, atol=1e-7)


def test_gradient_by_finite_differences(case):
    logits, labels = case(torch.float64, shape=(2, 3, 11), chunk=44)
    assert torch.autograd.gradcheck(lambda x: summed_cross_entropy(x, labels), logits)


def test_backward_twice_gives_the_same_gradient(case):
    logits, labels = case(torch.float32)
    total = summed_cross_entropy(logits, labels)
    first, second = (torch.autograd.grad(total, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_without_targets_it_is_exactly_zero_with_a_gradient_of_zeros(case):
    logits, labels = case(torch.float32)
    total = summed_cross_entropy(logits, torch.full_like(labels, -100))
    (gradient,) = torch.autograd.grad(total, logits)
    assert total.item() == 0.0
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_what_stands_where_there_is_no_target_does_not_matter(case):
    logits, labels = case(torch.float32)
    spoilt = logits.detach().clone()
    spoilt[labels == -100] = float("nan")
    spoilt.requires_grad_()
    total = summed_cross_entropy(spoilt, labels)
    (gradient,) = torch.autograd.grad(total, spoilt)
    assert torch.equal(total, summed_cross_entropy(logits, labels))
    assert torch.count_nonzero(gradient[labels == -100]) == 0


def test_logits_of_minus_infinity_have_no_probability_and_no_gradient(case):
    logits, labels = case(torch.float32)
    padded = F.pad(logits.detach(), (0, 8), value=float("-inf")).requires_grad_()
    total = summed_cross_entropy(padded, labels)
    (gradient,) = torch.autograd.grad(total, padded)
    torch.testing.assert_close(total, summed_cross_entropy(logits, labels), rtol=1e-6, atol=0)
    assert torch.count_nonzero(gradient[..., -8:]) == 0


@pytest.mark.parametrize("label", [8000, -1])
def test_a_label_outside_the_vocabulary_is_an_error(case, label):
    logits, labels = case(torch.float32)
    labels[1, 2] = label
    with pytest.raises(RuntimeError, match="out of bounds"):
        summed_cross_entropy(logits, labels)


def test_no_tensor_in_fp32_is_larger_than_a_chunk(case):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                self.elements = max(self.elements, result.numel())
            return result

    logits, labels = case(torch.bfloat16)
    with Largest() as largest:
        summed_cross_entropy(logits, labels).backward()
    assert 0 < largest.elements <= cross_entropy.CPU_CHUNK
