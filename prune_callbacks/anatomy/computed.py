"""Tensors of a layer that are no parameters: computed from others by torch's tools, or kept in another way."""

from torch import nn
from torch.nn.utils import parametrize

HOOKS = (
    ("mask", "torch.nn.utils.prune", "torch.nn.utils.prune.remove"),
    ("g", "torch.nn.utils.weight_norm", "torch.nn.utils.remove_weight_norm"),
    ("u", "torch.nn.utils.spectral_norm", "torch.nn.utils.remove_spectral_norm"),
)
"""What torch's hooks before `forward` add to a layer: the end of a tensor's name, the hook, and what removes it."""


def why_no_parameter(layer: nn.Module, name: str) -> str | None:
    """
    Returns why a tensor of a layer is no parameter, and what makes it one; None if it is a parameter.

    The tensor is not computed for that: spectral normalisation changes its own state whenever it is.

    Args:
        layer: the layer.
        name: the tensor's name in the layer, such as "weight".
    """
    shadowed = hasattr(type(layer), name)  # by a property: of torch's parametrizations, or of a subclass
    if isinstance(layer._parameters.get(name), nn.Parameter) and not shadowed:
        return None
    return _why_computed(layer, name) or (
        f"its {name} is no parameter but missing, a plain tensor, a buffer or a property; make it an nn.Parameter that "
        "forward uses"
    )


def _why_computed(layer: nn.Module, name: str) -> str | None:
    if parametrize.is_parametrized(layer, name):
        made = layer.get_submodule(f"parametrizations.{name}")
        by = " and ".join(type(part).__name__ for part in made.children())
        return (
            f"its {name} is computed by {by} (torch.nn.utils.parametrize); make it a parameter with "
            f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{name}")'
        )
    for end, hook, remove in HOOKS:
        if name not in layer._parameters and hasattr(layer, f"{name}_{end}"):
            return f'its {name} is computed by {hook}; make it a parameter with {remove}(layer, "{name}")'
    return None


def computed_tensors(model: nn.Module) -> dict[str, str]:
    """
    Returns the weights and biases of a model that torch's tools compute from others, by name, with what undoes that.

    Convolutions are left out: some models of `transformers` normalise theirs by themselves, and load them again so.
    """
    found = {
        f"{name}.{tensor}": _why_computed(layer, tensor)
        for name, layer in model.named_modules()
        for tensor in ("weight", "bias")
        if not hasattr(layer, "kernel_size")
    }
    return {name: why for name, why in found.items() if why is not None}
