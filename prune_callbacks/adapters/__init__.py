"""Low-rank adapters (peft) on sparse models: training and merging that preserve zeros."""

from prune_callbacks.adapters.lora import MaskedLoraLinear, MergeReport, add_lora, check_options, merge_lora

__all__ = ["MaskedLoraLinear", "MergeReport", "add_lora", "check_options", "merge_lora"]
