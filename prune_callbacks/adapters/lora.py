"""LoRA on a sparse base (Hu et al. 2022), plain or with the update under the base's own mask; needs peft."""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, Literal

from jaxtyping import Int
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import check_target_module_exists
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
"""Of peft's LoraConfig, those that neither train nor rewrite anything but the update."""


class MaskedLoraLinear(LoraLinear):
    """
    A LoRA layer whose update is zero wherever its base weight is.

    Equivalent to a linear layer with the weight `W + M * (B A) * scaling`, `M = (W != 0)`: what merging makes of
    it. The mask is read from the frozen base, so there is no second copy that could part from it. The sum is made
    again in the backward pass, so no more than one layer's is held at a time.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config = deepcopy(config)
        config.fan_in_fan_out = isinstance(base_layer, Conv1D)
        super().__init__(base_layer, adapter_name, config, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The masked update, of the base weight's shape."""
        update: Tensor = super().get_delta_weight(adapter)
        return update * (self.get_base_layer().weight != 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer with the merged weight."""
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
    What merging a plain LoRA into a sparse model cost.

    Attributes:
        sparsity: fraction of zeros in the masked weights, before and after.
        perplexity: before (base and adapter) and after, on the given windows.
    """

    sparsity: tuple[float, float]
    perplexity: tuple[float, float]


def add_lora(model: PreTrainedModel, pruned: Collection[str], config: LoraConfig, *, masked: bool) -> PeftModel:
    """
    Injects LoRA layers into a sparse model in place and freezes everything else.

    Equivalent to `peft.get_peft_model`, but for the mask on the update.

    Args:
        model: of transformers; stays the same object, its adapted layers are wrapped.
        pruned: names of the layers that are pruned.
        config: its `target_modules` may name pruned layers only; None or "all-linear": all of them. Not changed.
        masked: multiply the update by the base's mask, so that it can be merged without losing a zero.

    Returns:
        peft's wrapper around the model, for saving the adapter.

    Raises:
        ValueError: the model has adapters already, a target is not pruned, or an option of the config would train or
            change something else than a low-rank update (`modules_to_save`, biases, PiSSA, DoRA and others).
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
    """A copy without the list and mapping types of configuration libraries, which peft cannot write as JSON."""
    config = deepcopy(config)
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Mapping) and type(value) is not dict and field.name.endswith("_pattern"):
            setattr(config, field.name, dict(value))
        elif isinstance(value, Sequence) and not isinstance(value, str | list | tuple):
            setattr(config, field.name, list(value))
    return config


def check_options(config: LoraConfig, masked: bool) -> None:
    """Raises ValueError for options that would train or change something else than a low-rank update."""
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
    Merges the adapter into the model in place and takes the LoRA layers out.

    A masked LoRA merges exactly: outputs agree to rounding and every zero stays. A plain one has an update at every
    place: it either fills the zeros or loses the part of the update that lies on them, so it is refused unless
    `lossy` names which of the two is meant.

    Args:
        wrapper: what `add_lora` returned, or `PeftModel.from_pretrained(model, folder)`, whose layers are plain LoRA.
        masks: the masks of the sparse base.
        lossy: None: exact or not at all. "zeros": give up the zeros. "update": give up the update on them.
        windows: token ids to measure a lossy merge on.

    Returns:
        What a lossy merge cost; None for an exact one.
    """
    if not isinstance(wrapper, PeftModel):
        raise ValueError(f"merge_lora takes peft's wrapper around the model, got {type(wrapper).__name__}")
    if lossy not in (None, "zeros", "update"):
        raise ValueError(f'merge_lora: lossy must be None, "zeros" or "update", got {lossy!r}')
    model = wrapper.get_base_model()
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
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
            'lossy="zeros" gives up the zeros, lossy="update" the part of the update that lies on them'
        )
    if windows is None:
        raise ValueError(f'merge_lora(lossy="{lossy}") reports what the merge costs; give windows= to measure it on')
    before = perplexity(model, windows, progress=False), _zeros(masks, model)
    wrapper.merge_and_unload(safe_merge=True)
    if lossy == "update":
        masks.apply_(model.named_parameters())
    after = perplexity(model, windows, progress=False), _zeros(masks, model)
    return MergeReport(sparsity=(before[1], after[1]), perplexity=(before[0], after[0]))


def _zeros(masks: MaskSet, model: nn.Module) -> float:
    return MaskSet.from_nonzero(masks.matching(model.named_parameters())).sparsity()
