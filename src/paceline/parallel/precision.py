"""Mixed precision: the model computes in 16 bits, and learns in fp32, or (pure) in 16 bits as well.

Mixed: the model's own parameters are cast down; an fp32 master of each is what the optimizer, the sync and the
checkpoint see. After a backward pass each gradient is added to its master's in fp32, so accumulation over micro-batches
does not lose bits. This is what FSDP2's mixed-precision policy does for a sharded model, written for a whole one.

Pure: there are no masters. A gradient has the parameter's dtype, unless more are added to it: then it is fp32.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

OnGradient = Callable[[str], None]


class Masters:
    """The parameters that learn, by name, and how their values and gradients travel to and from the model.

    Masters are fp32 (fp64 for fp64 parameters). Where the model computes in that dtype, or learns in what it computes
    in (``pure``), they are its own parameters.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, pure: bool = False) -> None:
        self._compute: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in self._compute.items():
            master = dtype if pure else torch.promote_types(parameter.dtype, torch.float32)
            separate = master != dtype
            self.parameters[name] = nn.Parameter(parameter.detach().to(master, copy=True)) if separate else parameter
            parameter.data = _own(parameter.data, dtype)
        self._cast = [name for name in self.parameters if self.parameters[name] is not self._compute[name]]
        _cast_frozen(model, dtype)
        self._wide = WideGradients(self.parameters.values())

    def on_gradient(self, fn: OnGradient) -> None:
        """Call ``fn`` with the name of a parameter whenever a backward pass has added to its gradient."""
        for name, parameter in self._compute.items():
            parameter.register_post_accumulate_grad_hook(self._hook(name, fn))

    def expect(self, last: bool) -> None:
        """Say whether the next backward pass is the last of the step."""
        self._wide.expect(last)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters' values into the model, after the optimizer has changed them."""
        if self._cast:
            compute: list[torch.Tensor] = [self._compute[name] for name in self._cast]
            torch._foreach_copy_(compute, [self.parameters[name].detach() for name in self._cast])

    def _hook(self, name: str, fn: OnGradient) -> Callable[[torch.Tensor], None]:
        master = self.parameters[name]
        if master is self._compute[name]:
            return self._wide.telling(fn, name)

        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            if master.grad is None:
                master.grad = parameter.grad.to(master.dtype)
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None
            fn(name)

        return hook


class WideGradients:
    """Gradients of parameters that learn in 16 bits: fp32 as soon as more is to be added to them."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._last = True
        for parameter in parameters:
            if parameter.dtype.itemsize == 2:
                parameter.grad_dtype = None  # torch would refuse a gradient of another dtype

    def expect(self, last: bool) -> None:
        """Say whether the next backward pass is the last of the step."""
        self._last = last

    def telling(self, fn: OnGradient, name: str) -> Callable[[torch.Tensor], None]:
        """A hook for the gradient of a parameter, which calls ``fn`` with its name."""

        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            if not self._last and parameter.grad.dtype.itemsize == 2:
                parameter.grad = parameter.grad.float()
            fn(name)

        return hook


def _cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters take part in the computation as well, and are held, saved and exported in its dtype alone;
    buffers (rotary frequencies) keep their precision."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = _own(parameter.data, dtype)


def _own(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In memory of this process: what is on the CPU may be mapped from a file, which someone may replace."""
    return tensor.to(dtype, copy=tensor.device.type == "cpu")
