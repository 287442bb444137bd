"""SemiStructuredConvert: converts a model to 2:4 tensors or 8-bit 2:4 layers for inference, when a fit has ended."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from prune_callbacks.anatomy.blocks import find_blocks, find_language_model
from prune_callbacks.anatomy.targets import find_targets
from prune_callbacks.callbacks.kinds import PrunesInRounds, PrunesOnce, PruningCallback
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.deploy.backends import Hardware, choose_backend, why_not
from prune_callbacks.deploy.conversion import Conversion, find_two_four
from prune_callbacks.deploy.low_precision import convert_fp8_, convert_int8_
from prune_callbacks.deploy.semi_structured import convert_
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import kept_of_group

CASTS: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CONVERSIONS: Mapping[str, Callable[..., Conversion]] = {
    "model": convert_,
    "bfloat16": convert_,
    "float16": convert_,
    "int8": convert_int8_,
    "fp8": convert_fp8_,
}


class SemiStructuredConvert(PruningCallback):
    """
    Converts the module's language model when a fit has ended: `convert_`, `convert_int8_` or `convert_fp8_`.

    Put it after all callbacks of this package that read or change weights; `SparsityBenchmark` may follow. It acts in
    `on_fit_end`, when checkpoints are written and Lightning has moved the module to the CPU. It moves the module back
    to the fit's device, where the module stays. A fit that fails is not converted.

    `revert_(model)` restores the dense model. Call it before saving, casting, another fit and `trainer.test` (which
    moves the module to the CPU at its end). If nothing can be converted (no GPU with the kernels, no 2:4 layer), a
    warning gives the reason and the model stays dense.

    Args:
        targets: patterns of layer names; None for all linear layers of the decoder blocks.
        blocks: name of the list of decoder blocks, where it cannot be found.
        precision: "model": weights in the model's own bfloat16 or float16. "bfloat16" and "float16": the model is cast
            first, if the GPU has kernels for a layer of it. "int8" and "fp8": weights and inputs in 8 bits, for a model
            in any dtype.
        verify: compare the output of every converted layer with the dense layer's output.
        progress: show a progress bar.

    Attributes:
        conversion: the result, once the fit has ended; None before, and if the conversion failed.

    Raises:
        ValueError: `precision` is another word.
    """

    needs_whole_weights = True

    def __init__(
        self,
        targets: Sequence[str] | str | None = None,
        *,
        blocks: str | None = None,
        precision: Literal["model", "bfloat16", "float16", "int8", "fp8"] = "model",
        verify: bool = True,
        progress: bool = True,
    ) -> None:
        if precision not in CONVERSIONS:
            raise ValueError(f"SemiStructuredConvert: precision must be one of {list(CONVERSIONS)}, got {precision!r}")
        self.targets = targets
        self.blocks = blocks
        self.precision = precision
        self.verify = verify
        self.progress = progress
        self.conversion: Conversion | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        lineup = Lineup(trainer)
        if not lineup.begins_fit(self, stage):
            return
        self.conversion = None
        for callback in (*lineup.all(PrunesOnce), *lineup.all(PrunesInRounds)):
            if not _two_four(callback.pruner.pattern):
                raise ValueError(
                    f"SemiStructuredConvert converts 2:4 weights, and {type(callback).__name__} prunes to "
                    f"{callback.pruner.pattern}; prune to NM(2, 4)"
                )
        if next(pl_module.parameters(), None) is not None:
            # Reports a wrong name now, not at the end of the fit.
            find_targets(find_blocks(find_language_model(pl_module), self.blocks), self.targets)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if Lineup(trainer).trial() is not None:
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                pl_module.to(trainer.strategy.root_device)
                self._cast(find_language_model(pl_module))
                self.conversion = CONVERSIONS[self.precision](
                    find_language_model(pl_module),
                    targets=self.targets,
                    blocks=self.blocks,
                    verify=self.verify,
                    progress=self.progress and trainer.is_global_zero,
                )
            except (ValueError, torch.OutOfMemoryError) as error:
                # The fit succeeded; an error here would lose the trained weights.
                warnings.warn(f"the model stays dense: {error}", stacklevel=1)
        for warning in caught:
            rank_zero_warn(f"SemiStructuredConvert: {warning.message}", category=warning.category)
        if self.conversion is None or not self.conversion.converted:
            pl_module.cpu()  # where Lightning had moved it
        else:
            rank_zero_info(f"SemiStructuredConvert: {self.conversion}")

    def _cast(self, model: nn.Module) -> None:
        """Casts the parameters if there are kernels for a layer; buffers keep their precision."""
        if self.precision not in CASTS:
            return
        dtype, found = CASTS[self.precision], find_two_four(model, self.targets, self.blocks)
        backend = choose_backend(Hardware.of(found.device)).backend
        shapes = [layer.weight.shape for layer in found.layers.values()]
        if backend is not None and any(why_not(shape, dtype, backend) is None for shape in shapes):
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)


def _two_four(pattern: Pattern) -> bool:
    """Returns whether every mask of the pattern is also 2:4."""
    group = kept_of_group(pattern)
    return group is not None and (group == (1, 2) or (group[0] <= 2 and group[1] % 4 == 0))
