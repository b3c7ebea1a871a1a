"""Where a model drops out at random: until masks follow from positions, a layout may change what is drawn."""

from torch import nn


def dropouts(model: nn.Module) -> dict[str, float]:
    """Probabilities above 0 by module name: of dropout layers, and of what blocks pass to attention themselves."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            found[name] = module.p
        for key, value in vars(module).items():
            if "drop" in key and isinstance(value, float) and value > 0:
                found[f"{name}.{key}"] = value
    return found
