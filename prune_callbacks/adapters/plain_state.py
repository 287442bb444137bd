"""Keeps the `state_dict` of a model with masked LoRA layers that of the merged model, and stores the layers apart."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prune_callbacks.adapters.lora import MaskedLoraLinear
from prune_callbacks.sparsity import MaskSet

State = dict[str, Any]
BASE = "base_layer."


class PlainState:
    """
    Makes a model with masked LoRA layers save and load the state of the plain sparse model.

    `state_dict` has the names of the model without LoRA layers, and weights into which the update is merged, with all
    zeros. So every checkpoint loads into the plain model. A plain state that is loaded becomes the base, with an update
    of zero, unless `restore` was called: then it becomes the given layers.

    Args:
        model: a model with LoRA layers that `add_lora(masked=True)` made.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._restored: State | None = None
        # Functions, which torch marks with an attribute; of a copy of the model they get the copy.
        self._hooks: list[RemovableHandle] = [
            model.register_state_dict_post_hook(lambda module, state, prefix, _: _merge(module, state, prefix)),
            model.register_load_state_dict_pre_hook(
                lambda module, state, prefix, *_: self._split(module, state, prefix)
            ),
        ]

    def remove(self) -> None:
        """Gives the model back its own `state_dict`; call it when the LoRA layers are merged or removed."""
        for hook in self._hooks:
            hook.remove()

    def layers(self) -> State:
        """Returns the LoRA layers as plain values: their matrices, and the base weights, without the zeros."""
        bases = {name: layer.get_base_layer().get_parameter("weight").detach() for name, layer in _named(self._model)}
        return {
            "matrices": {
                f"{name}.{own}": parameter.detach().cpu().clone()
                for name, layer in _named(self._model)
                for own, parameter in layer.named_parameters()
                if not own.startswith(BASE)
            },
            "masks": MaskSet.from_nonzero(bases).state_dict(),
            "weights": {name: weight[weight != 0].cpu() for name, weight in bases.items()},
        }

    def restore(self, layers: State) -> None:
        """Makes the next loaded state that of these `layers`."""
        self._restored = layers

    def _split(self, module: nn.Module, state: State, prefix: str) -> None:
        """Turns a plain state into that of the LoRA layers, in place; leaves one that has LoRA layers as it is."""
        restored, self._restored = self._restored, None
        masks = None if restored is None else MaskSet.from_state_dict(restored["masks"])
        for name, layer in _named(module):
            place = f"{prefix}{name}."
            if f"{place}weight" not in state:
                continue
            for own in dict(layer.get_base_layer().named_parameters()):
                state[place + BASE + own] = state.pop(place + own)
            for own, parameter in layer.named_parameters():
                if not own.startswith(BASE):
                    zero = torch.zeros_like(parameter) if ".lora_B." in f".{own}" else parameter.detach()
                    state[place + own] = zero if restored is None else restored["matrices"][f"{name}.{own}"]
            if restored is not None and masks is not None:
                keep = masks[name]
                values: Tensor = restored["weights"][name]
                state[f"{place}{BASE}weight"] = values.new_zeros(keep.shape).masked_scatter_(keep, values)


def _named(model: nn.Module) -> Iterator[tuple[str, MaskedLoraLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, MaskedLoraLinear):
            yield name, module


@torch.no_grad()
def _merge(module: nn.Module, state: State, prefix: str) -> None:
    """Replaces LoRA layers in a state by merged weights, in place and in order."""
    layers = {f"{prefix}{name}.": layer for name, layer in _named(module)}
    before = dict(state)
    state.clear()
    for key, value in before.items():
        owner = next((own for own in layers if key.startswith(own)), None)
        if owner is None:
            state[key] = value
        elif key.startswith(owner + BASE):
            own = key.removeprefix(owner + BASE)
            state[owner + own] = _merged(layers[owner], value) if own == "weight" else value


def _merged(layer: MaskedLoraLinear, weight: Tensor) -> Tensor:
    merged = weight.detach().clone()
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            merged += layer.get_delta_weight(adapter).to(merged)
    return merged
