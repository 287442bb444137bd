"""Going through a model block by block."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from prune_callbacks.calibration.capture import Batch, BlockInputs, capture_inputs, run_block
from prune_callbacks.ranks import Ranks


def calibration_inputs(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch], ranks: Ranks
) -> list[BlockInputs]:
    """What every block is called with, for all batches of this rank; see `capture_inputs`."""
    if ranks.size > 1:
        mine = batches if isinstance(batches, Tensor) else list(batches)
        none_here = len(mine) == 0
        idle = not all(ranks.gather(none_here)) and none_here
        return ranks.attempt(lambda: [] if idle else capture_inputs(model, blocks, mine))
    return capture_inputs(model, blocks, batches)


def share_weights(model: nn.Module, ranks: Ranks) -> None:
    """Gives all ranks the weights of the first: they may have been drawn by another seed on every one."""
    for parameter in model.parameters():
        ranks.broadcast(parameter.data, 0)


def next_inputs(index: int, block: nn.Module, inputs: list[BlockInputs], where: torch.device, ranks: Ranks) -> None:
    """Makes the inputs of the next block out of those of this one, in place."""

    def advance() -> None:
        for batch in inputs:
            batch.hidden = run_block(index, block, batch, where)

    ranks.attempt(advance)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def layer_progress(total: int, show: bool) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar over layers, with an estimate of what is left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show) as bar:
        yield bar, bar.add_task("pruning", total=total)


def parsed_device(device: torch.device | str) -> torch.device:
    """The device; ValueError if there is none of that name, or it is a GPU that is not here."""
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is none that torch knows; name one such as 'cpu' or 'cuda:1'") from error
    count = torch.cuda.device_count()
    if parsed.type == "cuda" and (parsed.index or 0) >= count:
        raise ValueError(
            f"device={str(device)!r}, and there {'is' if count == 1 else 'are'} {count or 'no'} CUDA "
            f"device{'' if count == 1 else 's'} that torch {torch.__version__} can use; leave device out for the CPU"
        )
    return parsed


def check_dense(weight: Tensor) -> None:
    """Raises ValueError for a weight without values that can be changed: quantized, or on the meta device."""
    if not weight.is_floating_point() or weight.element_size() == 1:  # float8 goes with scales of its own
        raise ValueError(
            f"its weight is {weight.dtype}; quantized weights cannot be pruned, load the model dequantized"
        )
    if weight.is_meta:
        raise ValueError("its weight is on the meta device, without values; load the model into memory first")


def refuse_compiled(name: str, block: nn.Module) -> None:
    """Raises ValueError for a compiled block."""
    if hasattr(block, "_orig_mod") or getattr(block, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"block {name} is compiled, so the inputs of its layers cannot be seen; prune before compiling"
        )
