"""reconstruct_: trains the blocks of a model that is sparse already, whoever pruned it."""

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prune_callbacks.anatomy.blocks import find_language_model
from prune_callbacks.anatomy.names import belongs
from prune_callbacks.anatomy.stages import block_stages
from prune_callbacks.calibration.batches import Batch
from prune_callbacks.calibration.in_turn import calibration_source
from prune_callbacks.calibration.sources import Chain, evaluating
from prune_callbacks.engine.plan import parsed_device
from prune_callbacks.engine.progress import layer_progress
from prune_callbacks.engine.sharing import share_weights
from prune_callbacks.memory import peak_memory, reset_peak_memory
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.reconstruction.blocks import Rebuilder
from prune_callbacks.reconstruction.report import BlockReport
from prune_callbacks.reconstruction.settings import BlockReconstruction, check_reconstruction
from prune_callbacks.reconstruction.windows import single_windows
from prune_callbacks.results import Result
from prune_callbacks.sparsity import MaskSet

Parts = Sequence[tuple[str, nn.Module]]


@dataclass(frozen=True)
class ReconstructionReport(Result):
    """
    The result of `reconstruct_`.

    Attributes:
        blocks: one entry per reconstructed block, in order.
        untrained: the reason for every parameter of these blocks that was left as it was, by name.
        seconds: wall time of the whole run.
        peak_memory_bytes: the process's peak memory; on a CUDA device, the peak of allocated device memory.
    """

    blocks: tuple[BlockReport, ...]
    untrained: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_bytes: int = 0


@torch.no_grad()
def reconstruct_(
    sparse_model: nn.Module,
    dense_model: nn.Module,
    batches: Iterable[Batch],
    masks: MaskSet,
    reconstruction: BlockReconstruction,
    *,
    blocks: str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> ReconstructionReport:
    """
    Trains the pruned blocks of a sparse model in place, one after another, to compute what the dense model's blocks do.

    Equivalent to the training in `prune_sequentially(..., reconstruction=)`, for masks and weights of any origin.

    Args:
        sparse_model: the sparse model, with zeros where `masks` prune.
        dense_model: the model before pruning; it is not changed.
        batches: calibration batches, as in `prune_sequentially`.
        masks: the keep masks, by parameter name, e.g. `MaskSet.from_nonzero` of the pruned weights.
        reconstruction: the settings.
        blocks: the name of the list of blocks in both models, where it cannot be found.
        device: the device to run and train blocks on, one at a time; None: each model's own.
        progress: show a progress bar.
        ranks: processes that share the work, each with the same models and with its own batches.

    Raises:
        ValueError: before any work: the models or the masks do not fit each other, a pruned weight is not zero, the
            blocks form no chain, or the windows are too few. During the work, naming the block: outputs are not finite.
    """
    begin = time.perf_counter()
    if reconstruction is None:
        raise ValueError("reconstruct_ needs a BlockReconstruction, got None; e.g. BlockReconstruction()")
    check_reconstruction("reconstruct_", reconstruction)
    where = ranks.attempt(lambda: None if device is None else parsed_device(device))
    _check_kinds(sparse_model, dense_model, masks)
    sparse_model, dense_model = (
        find_language_model(getattr(model, "_orig_mod", model)) for model in (sparse_model, dense_model)
    )
    stages, dense = block_stages(sparse_model, blocks), block_stages(dense_model, blocks)
    given, windows = single_windows(several(batches), reconstruction, ranks)
    for model in (sparse_model, dense_model):
        share_weights(model, ranks)
    masks = ranks.attempt(lambda: _checked(sparse_model, dense_model, masks, stages.parts, dense.parts))
    if where is not None:
        reset_peak_memory(where)
    rebuilder = Rebuilder(sparse_model, reconstruction, windows, ranks)
    outputs, inputs = _Chained(dense_model, dense.parts, where), _Chained(sparse_model, stages.parts, where)
    there = _reconstruct_blocks(rebuilder, outputs, inputs, given, masks, ranks, progress and ranks.rank == 0)
    rebuilder.finish()
    if rebuilder.reports and rebuilder.reports[0].before >= 1 and ranks.rank == 0:
        first = rebuilder.reports[0]
        warnings.warn(
            f"the error of {first.name} was {first.before:.3g} of its target before the training, so outputs of zeros "
            "would have been nearer to it: is dense_model the model before pruning?",
            stacklevel=2,
        )
    seconds = time.perf_counter() - begin
    return ReconstructionReport(tuple(rebuilder.reports), rebuilder.left, seconds, peak_memory(there))


def _check_kinds(model: object, dense: object, masks: object) -> None:
    for name, value in (("sparse_model", model), ("dense_model", dense)):
        if not isinstance(value, nn.Module):
            raise ValueError(f"reconstruct_: {name} must be a torch module, got {type(value).__name__}")
    if not isinstance(masks, MaskSet) or not masks:
        found = "an empty one" if isinstance(masks, MaskSet) else type(masks).__name__
        raise ValueError(
            f"reconstruct_: masks must be a MaskSet with a mask, got {found}; make one of keep masks by name, "
            "MaskSet({name: keep}), or of the zeros, MaskSet.from_nonzero({name: parameter})"
        )


class _Chained(NamedTuple):
    """A model, its blocks, and the device to move these to."""

    model: nn.Module
    parts: Parts
    device: torch.device | None

    def chain(self, batches: Sequence[Batch], ranks: Ranks) -> Chain:
        return calibration_source(self.model, [part for _, part in self.parts], batches, ranks).chain("reconstruct_")


def _reconstruct_blocks(
    rebuilder: Rebuilder,
    dense: _Chained,
    sparse: _Chained,
    batches: Sequence[Batch],
    masks: MaskSet,
    ranks: Ranks,
    show: bool,
) -> torch.device:
    """Reconstructs the sparse model's blocks up to the last one with a mask; returns the device of the last."""
    reached = _up_to_the_last(sparse.parts, masks)
    with evaluating(sparse.model), evaluating(dense.model), layer_progress(len(reached), show, "blocks") as (bar, task):
        bar.update(task, description="running the first calibration batch")
        outputs, inputs = dense.chain(batches, ranks), sparse.chain(batches, ranks)
        with closing(inputs.visits(reached, sparse.device)) as visits:
            for index, name, block, there in visits:
                bar.update(task, description=f"running {name}")
                # The dense block leaves the device before the training.
                with closing(outputs.visits(dense.parts[index : index + 1], dense.device)) as alone:
                    for _, _, dense_block, dense_there in alone:
                        outputs.advance(index, dense_block, dense_there)
                rebuilder.reconstruct(
                    index,
                    name,
                    block,
                    inputs.inputs,
                    outputs.inputs,
                    masks,
                    there,
                    lambda text: bar.update(task, description=text),
                )
                inputs.advance(index, block, there)
                bar.advance(task)
    return there


def several(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Returns the batches; raises ValueError for one tensor, or None, in place of several."""
    if batches is None or isinstance(batches, Tensor):
        found = "None" if batches is None else f"one tensor of shape {tuple(batches.shape)}; split it"
        raise ValueError(f"batches must be several calibration batches, got {found}")
    return batches


def _checked(model: nn.Module, dense: nn.Module, masks: MaskSet, parts: Parts, dense_parts: Parts) -> MaskSet:
    """Returns the masks by the names of the sparse model; raises ValueError if models and masks do not fit."""
    own, other = _shapes(parts), _shapes(dense_parts)
    if own != other:
        name = next(name for name in {**own, **other} if own.get(name) != other.get(name))
        raise ValueError(
            f"the dense model's blocks have another shape than the sparse model's: {name} has {_told(other, name)} "
            f"there and {_told(own, name)} here. Give the model that was pruned, before pruning"
        )
    named = dict(model.named_parameters())
    places = masks.places({name: tuple(value.shape) for name, value in named.items()}, named.keys())
    masks = MaskSet({place: masks[name] for name, place in places.items()})
    wrong = masks.violations(named)
    if wrong:
        raise ValueError(
            f"{sum(wrong.values())} weights that the masks prune are not zero, first in {next(iter(wrong))}: zero them "
            "first (masks.apply_(model.named_parameters())), or give the masks of this model"
        )
    inside = [name for name in masks if any(belongs(name, part) for part, _ in parts)]
    if not any(named[name].requires_grad for name in inside):
        raise ValueError(
            f"none of the {len(masks)} masks is of a weight in the blocks that can be trained (requires_grad=True)"
        )
    before = dict(dense.named_parameters())
    if model is dense or not any(_dense(before[name], masks[name]) for name in inside if name in before):
        raise ValueError(
            "the dense model has zeros wherever the masks prune, so it is the pruned model, or a copy of it: load the "
            "model again as it was before pruning"
        )
    return masks


def _told(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"shape {shapes[name]}" if name in shapes else "no such parameter"


def _dense(weight: Tensor, keep: Tensor) -> bool:
    """Returns whether a weight has values where a mask prunes."""
    return bool(weight.detach()[~keep.to(weight.device)].count_nonzero())


def _shapes(parts: Parts) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{own}": tuple(value.shape) for name, part in parts for own, value in part.named_parameters()}


def _up_to_the_last(parts: Parts, masks: MaskSet) -> Parts:
    """Returns the blocks up to the last one that has a mask."""
    return parts[: 1 + max(i for i, (name, _) in enumerate(parts) if any(belongs(mask, name) for mask in masks))]
