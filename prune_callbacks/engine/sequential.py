"""The engine: prunes a model block by block, every block on the outputs of the pruned ones before it."""

import time
from collections.abc import Iterable, Sequence
from contextlib import closing

import torch
from torch import nn

from prune_callbacks.allocation.measuring import allocate, check_allocation
from prune_callbacks.allocation.rules import Allocation
from prune_callbacks.anatomy.blocks import find_blocks, find_targets, naming, stored_name, weight_shape
from prune_callbacks.anatomy.coupling import Coupled, coupled_targets, planned_removal
from prune_callbacks.anatomy.experts import inside
from prune_callbacks.calibration.capture import Batch, BlockInputs
from prune_callbacks.calibration.prefetch import visited
from prune_callbacks.calibration.statistics import collect
from prune_callbacks.calibration.walking import (
    calibration_inputs,
    check_dense,
    evaluating,
    layer_progress,
    next_inputs,
    parsed_device,
    refuse_compiled,
    share_weights,
)
from prune_callbacks.engine.report import PruneReport, warn_of_other_counts
from prune_callbacks.engine.solving import BlockPruning, takes_experts
from prune_callbacks.memory import peak_memory
from prune_callbacks.pruners import Pruner, Structured, check_pruner
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.sparsity import MaskSet


@torch.no_grad()
def prune_sequentially(
    model: nn.Module,
    batches: Iterable[Batch] | None,
    pruner: Pruner,
    *,
    targets: Sequence[str] | str | None = None,
    blocks: str | None = None,
    device: torch.device | str | None = None,
    allocation: Allocation | None = None,
    min_expert_tokens: int = 32,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> PruneReport:
    """
    Prunes a causal language model in place, block by block.

    Equivalent to re-running the whole model, with all earlier blocks pruned, to collect the inputs of every
    block; each block's inputs are computed once from the previous block's outputs instead.

    Args:
        model: a `transformers` causal LM, or any module with an `nn.ModuleList` of blocks.
        batches: token ids (batch, tokens), or mappings with `input_ids` and maybe `attention_mask` (padding
            does not count toward the statistics). May be None for a pruner that needs no calibration.
        pruner: decides what goes and what becomes of the rest.
        targets: patterns of layer names; None for every Linear, Conv1D and fused expert inside the blocks, but not
            what decides which experts a token goes to.
        blocks: name of the list of decoder blocks, where it cannot be found.
        device: where blocks are moved, one at a time, to be run and solved; None: where the model is. To a GPU the next
            block is copied while one is solved for, so that two are there.
        allocation: spreads the pattern's sparsity over the layers, e.g. `OWL()`; None: the same in all of them.
        min_expert_tokens: an expert that fewer calibration tokens reach is pruned by Magnitude, in the same pattern,
            with a warning that names it. Over 32 tokens the norm of a (Gaussian) feature is known to an eighth.
        progress: show a progress bar.
        ranks: processes that share the work, each with the same model and with batches of its own (maybe none): the
            statistics are summed over them, every layer is solved on one of them, and all end with the same weights.
            Equivalent to one process with all batches, to the rounding of the sums.

    Raises:
        ValueError: before any work for targets, shapes or blocks that do not fit; on the way, naming the
            layer, for activations that are not finite or a Gram that cannot be factorised.
    """
    begin = time.perf_counter()
    check_pruner("prune_sequentially", pruner)
    if allocation is not None:
        check_allocation(allocation, pruner)
    model = getattr(model, "_orig_mod", model)  # torch.compile(model) wraps the model that is meant
    found = find_blocks(model, blocks)
    for block_name, block in found:
        refuse_compiled(block_name, block)
    chosen = find_targets(found, targets, experts=takes_experts(pruner))
    coupled: list[Coupled] = []
    left: dict[str, str] = {}
    removed: dict[str, int] = {}
    if isinstance(pruner, Structured):
        coupled, left = coupled_targets(found, chosen)
        chosen = {name: layer for name, layer in chosen.items() if name not in left}
        removed = planned_removal(model, coupled, chosen, pruner)
    readers = {group.reader for group in coupled}
    for name, layer in chosen.items():
        with naming(name):
            check_dense(layer.get_parameter("weight"))
            pruner.pattern.check_shape(weight_shape(layer))
    forced = ranks.attempt(lambda: None if device is None else parsed_device(device))
    calibrated = pruner.statistic(1) is not None
    observed = calibrated or (allocation is not None and allocation.statistic(1) is not None)
    if observed and batches is None:
        raise ValueError(f"{type(pruner if calibrated else allocation).__name__} needs calibration batches, got None")
    if forced is not None and forced.type == "cuda":
        torch.cuda.reset_peak_memory_stats(forced)
    last = max(i for i, (block_name, _) in enumerate(found) if any(inside(n, block_name) for n in chosen))
    run = BlockPruning(pruner, ranks, coupled, removed, min_expert_tokens)
    run.skipped.update(left)
    if targets is None:
        run.note_dense(found, chosen)
    share_weights(model, ranks)
    with (
        evaluating(model),
        layer_progress(len(chosen), progress and ranks.rank == 0) as (bar, task),
        closing(visited(found[: last + 1], forced, ranks)) as visits,
    ):
        inputs: list[BlockInputs] = []
        if observed and batches is not None:
            bar.update(task, description="embedding the calibration windows")
            inputs = calibration_inputs(model, [block for _, block in found], batches, ranks)
        if allocation is not None:
            bar.update(task, description=f"{type(allocation).__name__}: measuring the dense model")
            run.pruners = allocate(allocation, pruner, found[: last + 1], chosen, inputs, forced, ranks)
        for index, block_name, block, where in visits:
            layers = {n: m for n, m in chosen.items() if inside(n, block_name)}
            bar.update(task, description=f"pruning {block_name}")
            if layers:
                seen = {name: layer for name, layer in layers.items() if not coupled or name in readers}
                statistics = collect(pruner.statistic, index, block, seen, inputs, where, ranks) if calibrated else {}
                run.prune(layers, statistics, lambda count: bar.advance(task, count))
                del statistics
            if index < last and calibrated:
                next_inputs(index, block, inputs, where, ranks)
    if not run.layers:
        raise ValueError(
            f"nothing was pruned; all {len(run.skipped)} layers were skipped: {next(iter(run.skipped.values()))}"
        )
    if allocation is not None and ranks.rank == 0:
        warn_of_other_counts({stored_name(n, m): run.pruners[n] for n, m in chosen.items()}, run.layers)
    return PruneReport(
        MaskSet.join(run.masks),
        tuple(run.layers),
        run.skipped,
        time.perf_counter() - begin,
        peak_memory(where),
        frozenset(run.input_first),
        run.scales,
        run.by_magnitude,
    )
