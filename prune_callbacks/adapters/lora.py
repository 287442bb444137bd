"""LoRA on a sparse base (Hu et al. 2022), plain or with the base's mask on the update; needs peft."""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, Literal

from jaxtyping import Int
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.results import Result
from prune_callbacks.sparsity import MaskSet

OPTIONS = {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "task_type",
    "peft_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}
"""Options of peft's LoraConfig that train or change only the low-rank update."""


class MaskedLoraLinear(LoraLinear):
    """
    A LoRA layer whose update is zero wherever its base weight is zero.

    Equivalent to a linear layer with the merged weight `W + M * (B A) * scaling`, where `M = (W != 0)`. The mask is
    computed from the frozen base, so that it cannot differ from it. The merged weight is recomputed in the backward
    pass, so that only one layer's is held at a time.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config = deepcopy(config)
        config.fan_in_fan_out = isinstance(base_layer, Conv1D)
        super().__init__(base_layer, adapter_name, config, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns the masked update, in the shape of the base weight."""
        update: Tensor = super().get_delta_weight(adapter)
        return update * (self.get_base_layer().weight != 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output of the base layer with the merged weight."""
        result: Tensor
        if self.disable_adapters or self.merged:
            result = self.base_layer(x, *args, **kwargs)
        else:
            result = checkpoint(self._merged_forward, x, use_reentrant=False, preserve_rng_state=False)
        return result

    def _merged_forward(self, x: Tensor) -> Tensor:
        base = self.get_base_layer()
        weight: Tensor = base.get_parameter("weight")
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                weight = weight + self.get_delta_weight(adapter).to(weight.dtype)
        bias = None if base.bias is None else base.get_parameter("bias")
        return nn.functional.linear(x, weight.T if self.fan_in_fan_out else weight, bias)


@dataclass(frozen=True)
class MergeReport(Result):
    """
    The loss from merging a plain LoRA into a sparse model.

    Attributes:
        sparsity: fraction of zeros in the masked weights, before and after the merge.
        perplexity: perplexity on the given windows, before (base and adapter) and after the merge.
    """

    sparsity: tuple[float, float]
    perplexity: tuple[float, float]


def add_lora(model: PreTrainedModel, pruned: Collection[str], config: LoraConfig, *, masked: bool) -> PeftModel:
    """
    Injects LoRA layers into a sparse model in place and freezes everything else.

    Equivalent to `peft.get_peft_model`, except for the mask on the update.

    Args:
        model: a model of transformers; it stays the same object, and its adapted layers are wrapped.
        pruned: names of the pruned layers.
        config: the LoRA configuration, which is not changed. Its `target_modules` may name pruned layers only; None or
            "all-linear" selects all of them.
        masked: multiply the update by the mask of the base, so that merging preserves all zeros.

    Returns:
        peft's wrapper around the model, for saving the adapter.

    Raises:
        ValueError: the model has adapters already, a target is not pruned, or an option of the config would train or
            change more than a low-rank update (`modules_to_save`, biases, PiSSA, DoRA and others).
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model has adapters already; merge or unload them first")
    config = _plain_values(config)
    check_options(config, masked)
    if config.target_modules is None or config.target_modules == "all-linear":
        config.target_modules = list(pruned)
    targeted = [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]
    if dense := [name for name in targeted if name not in set(pruned)]:
        raise ValueError(
            f"LoRA on {len(dense)} layers that are not pruned, first {dense[0]}; of {len(targeted)} targeted layers "
            f"{len(targeted) - len(dense)} are pruned. Leave target_modules out for all pruned layers"
        )
    if masked:
        # peft calls this dispatch of layer types experimental, hence the bounds on its version.
        config._register_custom_module({nn.Linear: MaskedLoraLinear, Conv1D: MaskedLoraLinear})
    wrapper = get_peft_model(model, config)
    assert isinstance(wrapper, PeftModel)
    return wrapper


def _plain_values(config: LoraConfig) -> LoraConfig:
    """Returns a copy with plain lists and dicts; peft cannot write those of configuration libraries as JSON."""
    config = deepcopy(config)
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Mapping) and type(value) is not dict and field.name.endswith("_pattern"):
            setattr(config, field.name, dict(value))
        elif isinstance(value, Sequence) and not isinstance(value, str | list | tuple):
            setattr(config, field.name, list(value))
    return config


def check_options(config: LoraConfig, masked: bool) -> None:
    """Raises ValueError for options that would train or change more than a low-rank update."""
    allowed = OPTIONS if masked else OPTIONS | {"lora_dropout"}
    default = LoraConfig()
    other = [f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)]
    refused = [name for name in other if name not in allowed]
    if config.init_lora_weights not in (True, "gaussian"):
        refused.append(f"init_lora_weights={config.init_lora_weights!r}")
    if refused:
        raise ValueError(
            f"LoRA on a sparse model is a low-rank update{' under its mask' if masked else ''} and nothing else: leave "
            f"out {', '.join(refused)}. What may be set: {', '.join(sorted(allowed))}"
        )


def merge_lora(
    wrapper: PeftModel,
    masks: MaskSet,
    *,
    lossy: Literal["zeros", "update"] | None = None,
    windows: Int[Tensor, "windows tokens"] | None = None,
) -> MergeReport | None:
    """
    Merges the adapter into the model in place and removes the LoRA layers.

    A masked LoRA merges exactly: outputs agree up to rounding, and all zeros are preserved. A plain LoRA updates all
    weights: merging either fills the zeros or drops the part of the update at zeros, so it is refused unless `lossy`
    names one of the two.

    Args:
        wrapper: the result of `add_lora`, or `PeftModel.from_pretrained(model, folder)`, whose layers are plain LoRA.
        masks: the masks of the sparse base.
        lossy: None: refuse a lossy merge. "zeros": give up the zeros. "update": give up the update at the zeros.
        windows: token ids (windows, tokens) on which a lossy merge is measured.

    Returns:
        sparsity and perplexity before and after a lossy merge; None for an exact one.

    Raises:
        ValueError: an argument is invalid, the adapters are no LoRA on linear layers, a plain LoRA is merged without
            `lossy` or `windows`, or the base has weights outside of the masks.
    """
    if not isinstance(wrapper, PeftModel):
        raise ValueError(f"merge_lora takes peft's wrapper around the model, got {type(wrapper).__name__}")
    if lossy not in (None, "zeros", "update"):
        raise ValueError(f'merge_lora: lossy must be None, "zeros" or "update", got {lossy!r}')
    model = wrapper.get_base_model()
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    others = [module for module in tuned if not isinstance(module, LoraLinear)]
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in wrapper.peft_config.values()}
    if kinds != {"LORA"} or others:
        found = ", ".join(sorted(kinds | {type(module).__name__ for module in others}))
        raise ValueError(
            f"merge_lora merges LoRA on linear layers, and the model has other adapters ({found}), whose update would "
            "fill the zeros. Keep them as adapters, or merge_and_unload() and prune again"
        )
    if all(isinstance(layer, MaskedLoraLinear) for layer in layers):
        wrapper.merge_and_unload(safe_merge=True)
        if violations := masks.violations(model.named_parameters()):
            raise ValueError(f"the base had weights outside the masks before the merge: {violations}")
        return None
    if lossy is None:
        weights = [layer.get_base_layer().get_parameter("weight") for layer in layers]
        total = sum(weight.numel() for weight in weights)
        zeros = total - sum(int(weight.count_nonzero()) for weight in weights)
        raise ValueError(
            f"merging a plain LoRA into this sparse model would fill the {zeros} zeros of {len(layers)} layers "
            f"({zeros / total:.1%}). Keep it as an adapter, train LoRARecovery(masked=True), or name the loss: "
            'lossy="zeros" gives up the zeros, lossy="update" the part of the update at the zeros'
        )
    if windows is None:
        raise ValueError(f'merge_lora(lossy="{lossy}") reports what the merge costs; give windows= to measure')
    before = perplexity(model, windows, progress=False), _zeros(masks, model)
    wrapper.merge_and_unload(safe_merge=True)
    if lossy == "update":
        masks.apply_(model.named_parameters())
    after = perplexity(model, windows, progress=False), _zeros(masks, model)
    return MergeReport(sparsity=(before[1], after[1]), perplexity=(before[0], after[0]))


def _zeros(masks: MaskSet, model: nn.Module) -> float:
    return MaskSet.from_nonzero(masks.matching(model.named_parameters())).sparsity()
