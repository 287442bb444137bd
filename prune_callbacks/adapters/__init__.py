"""Low-rank adapters on sparse models (peft): trained so that zeros stay, and merged only if they do."""

from prune_callbacks.adapters.lora import MaskedLoraLinear, MergeReport, add_lora, check_options, merge_lora

__all__ = ["MaskedLoraLinear", "MergeReport", "add_lora", "check_options", "merge_lora"]
