"""SemiStructuredConvert: gives a model whose fit has ended 2:4 tensors, or 8-bit 2:4 layers, for inference."""

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

    The last of this package's callbacks that read or change weights; one that measures speed may follow. It acts in
    `on_fit_end`: by then Lightning has moved the module to the CPU, the others have finished and checkpoints are
    written. The module goes back to the fit's device and stays there. A fit that fails is not converted.

    `revert_(model)` gives the dense model back. Saving, casting and another fit need it, and `trainer.test` too, which
    moves the module to the CPU at its end. Where nothing can be converted (no GPU that has the kernels, nothing 2:4) a
    warning says why and the model stays dense.

    Args:
        targets: patterns of layer names; None for all linear layers of the decoder blocks.
        blocks: name of the list of decoder blocks, where it cannot be found.
        precision: "model": weights in the model's own bfloat16 or float16; "bfloat16" and "float16": the model is cast
            first, if the GPU has kernels at all; "int8" and "fp8": weights and inputs in 8 bits, of a model in any
            dtype.
        verify: compare every layer's output with the dense layer's.
        progress: show a progress bar.

    Attributes:
        conversion: what was done, once the fit has ended; None also where nothing was 2:4.
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
        if stage != "fit":
            return
        self.conversion = None
        lineup = Lineup(trainer)
        for callback in (*lineup.all(PrunesOnce), *lineup.all(PrunesInRounds)):
            if not _two_four(callback.pruner.pattern):
                raise ValueError(
                    f"SemiStructuredConvert converts 2:4 weights, and {type(callback).__name__} prunes to "
                    f"{callback.pruner.pattern}; prune to NM(2, 4)"
                )
        lineup.check(self)
        if next(pl_module.parameters(), None) is not None:
            # A wrong name is to be known now, not when the fit is over.
            find_targets(find_blocks(find_language_model(pl_module), self.blocks), self.targets)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
                # The fit is over and was good; what it trained is not to be lost for this.
                warnings.warn(f"the model stays dense: {error}", stacklevel=1)
        for warning in caught:
            rank_zero_warn(f"SemiStructuredConvert: {warning.message}", category=warning.category)
        if self.conversion is None or not self.conversion.converted:
            pl_module.cpu()  # as Lightning left it
        else:
            rank_zero_info(f"SemiStructuredConvert: {self.conversion}")

    def _cast(self, model: nn.Module) -> None:
        """Casts the parameters, if there are kernels and a layer for them; buffers stay as precise as they are."""
        if self.precision not in CASTS:
            return
        dtype, found = CASTS[self.precision], find_two_four(model, self.targets, self.blocks)
        backend = choose_backend(Hardware.of(found.device)).backend
        shapes = [layer.weight.shape for layer in found.layers.values()]
        if backend is not None and any(why_not(shape, dtype, backend) is None for shape in shapes):
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)


def _two_four(pattern: Pattern) -> bool:
    """Whether every mask of the pattern is 2:4."""
    group = kept_of_group(pattern)
    return group is not None and (group == (1, 2) or (group[0] <= 2 and group[1] % 4 == 0))
