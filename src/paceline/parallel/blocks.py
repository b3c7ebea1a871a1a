"""The repeated blocks of a model: what recompute, compilation and later cutting work on."""

from torch import nn


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The items of the model's outermost module lists, by their names in the model.

    These are a decoder's layers, or the encoder's and the decoder's. Lists inside a block (experts, layer groups) are
    part of the block. Empty for a model without module lists.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name == block or name.startswith(f"{block}.") for block in found)
        if inside or not isinstance(module, nn.ModuleList):
            continue
        for index, item in enumerate(module):
            if any(True for _ in item.parameters()):
                found[f"{name}.{index}"] = item
    return found
