"""Layers wrapped by peft: an adapted layer keeps the original in `base_layer`, alongside the adapter's matrices."""

from collections.abc import Mapping

from torch import Tensor, nn


def adapted_layers(module: nn.Module) -> list[str]:
    """Returns the names of the layers in `module` that have adapters."""
    return [name for name, layer in module.named_modules() if hasattr(layer, "base_layer")]


def adapter_modules(module: nn.Module) -> set[str]:
    """Returns the names of the modules in `module` that belong to adapters and not to the base model."""
    adapted = [f"{name}." for name in adapted_layers(module)]
    return {
        name
        for name, _ in module.named_modules()
        if any(name.startswith(prefix) and name != f"{prefix}base_layer" for prefix in adapted)
    }


def refuse_adapters(model: nn.Module) -> None:
    """Raises ValueError for a model with unmerged adapters."""
    adapted = adapted_layers(model)
    if adapted:
        raise ValueError(
            f"{len(adapted)} layers have adapters, first {adapted[0]}: merge them (LoRARecovery(masked=True), "
            "merge_lora) or remove them (unload) first"
        )


def base_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a model's state without its adapters, under the names of the model without adapters."""
    adapters = [f"{name}." for name in adapted_layers(model)]
    state: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        wrapper = next((prefix for prefix in adapters if key.startswith(prefix)), None)
        if wrapper is None:
            state[key] = value
        elif key.startswith(f"{wrapper}base_layer."):
            state[wrapper + key.removeprefix(f"{wrapper}base_layer.")] = value
        elif "." not in key.removeprefix(wrapper):  # a masked LoRA layer, which saves the merged weight
            state[key] = value
    return state


def without_adapter(name: str) -> str:
    """Returns the name that a parameter of an adapted layer has in the model without adapters."""
    return name.replace(".base_layer.", ".")
