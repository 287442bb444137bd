"""Prunes a model stage by stage; every stage is calibrated on what the pruned stages before it compute."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prune_callbacks.allocation.measuring import allocate, prepared
from prune_callbacks.allocation.protocol import Allocation
from prune_callbacks.anatomy.stages import Stages, find_stages
from prune_callbacks.calibration.batches import Batch, OwnStep, named_inputs
from prune_callbacks.calibration.described import count_tokens
from prune_callbacks.calibration.in_turn import calibration_source, last_called
from prune_callbacks.calibration.prefetch import Visit
from prune_callbacks.calibration.sources import Chain, Source, evaluating
from prune_callbacks.engine.fitting import check_reconstructible
from prune_callbacks.engine.plan import Plan, make_plan
from prune_callbacks.engine.progress import layer_progress
from prune_callbacks.engine.rebuilding import Rebuilding, cut
from prune_callbacks.engine.report import PruneReport, warn_of_missed_counts
from prune_callbacks.engine.sharing import share_weights
from prune_callbacks.engine.solving import BlockPruning
from prune_callbacks.memory import peak_memory
from prune_callbacks.pruners import Pruner
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.reconstruction.settings import BlockReconstruction

Order = Literal["sequential", "at_once"]


def check_order(order: str) -> None:
    """Raises ValueError for an order that there is not."""
    if order not in ("sequential", "at_once"):
        raise ValueError(f'order must be "sequential" or "at_once", got {order!r}')


@torch.no_grad()
def prune_sequentially(
    model: nn.Module,
    batches: Iterable[Batch] | None,
    pruner: Pruner,
    *,
    targets: Sequence[str] | str | None = None,
    blocks: str | Sequence[str] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    order: Order = "sequential",
    device: torch.device | str | None = None,
    allocation: Allocation | None = None,
    reconstruction: BlockReconstruction | None = None,
    min_expert_tokens: int = 32,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> PruneReport:
    """
    Prunes a model in place, stage by stage: block by block, or layer by layer where it has no blocks.

    Equivalent to running the whole model again for every stage, with all earlier stages pruned, to collect the stage's
    inputs. Stages come in the order of their execution. Where blocks form a chain, each block's inputs are computed
    once instead, from the outputs of the block before it. Where they do not (see `capture_inputs`), the whole model
    does run again, and a warning says so.

    Args:
        model: a model of `transformers`, or any other module.
        batches: tensors, such as token ids (batch, tokens) or images, or mappings of arguments of the model's forward,
            such as `input_ids`, `attention_mask` (padding does not count), `inputs_embeds` or `pixel_values`. Keys
            that the forward does not accept are named in a warning. May be None for a pruner that needs no calibration.
        pruner: chooses the masks and the values of survivors.
        targets: patterns of layer names. None: of a model of transformers every linear layer, convolution (except
            depthwise ones) and expert inside of the blocks, except routers; of other modules every linear layer,
            convolution, attention and recurrent layer, except the last layer, which makes the output, those whose
            weight is an embedding's, frozen ones beside trained ones, and those whose shape does not fit the pattern.
            `report.skipped` names what is left out.
        blocks: the name of the list of blocks, or of several. None: of a model of transformers the stack of the
            language model, or encoder and decoder; of other modules every `nn.ModuleList`.
        forward: runs the model on a batch, which may then be of any kind; it is called with both. None: the model's own
            forward.
        order: "sequential", as above; "at_once": the statistics of all layers come from one pass of the dense model.
        device: the device to run and solve blocks on, one at a time; None: the model's own. While a GPU solves for one
            block, the next is copied to it, so the GPU holds two.
        allocation: spreads the pattern's sparsity over the layers, e.g. `OWL()`; None: the same in every layer.
        reconstruction: trains the kept weights of every block right after pruning, towards the dense block's outputs;
            None: blocks stay as the pruner leaves them. It needs blocks that form a chain.
        min_expert_tokens: an expert that fewer calibration tokens reach is pruned by Magnitude to the same pattern, and
            a warning names it. Over 32 tokens the norm of a Gaussian feature is known to an eighth.
        progress: show a progress bar.
        ranks: processes that share the work, each with the same model and with its own batches (maybe none). Statistics
            are summed over the ranks, every layer is solved on one rank, and all ranks get the same weights.
            Equivalent to one process with all batches, to the rounding of the sums.

    Returns:
        the masks, one report per layer, and the skipped layers.

    Raises:
        ValueError: before any work, for targets, shapes or blocks that do not fit; during the work, naming the layer,
            for activations that are not finite or a Gram that cannot be factorised.
    """
    check_order(order)
    check_reconstructible("prune_sequentially", reconstruction, pruner, order)
    begin = time.perf_counter()
    model = getattr(model, "_orig_mod", model)  # torch.compile(model) wraps the model
    batches, stages = _staged(model, batches, targets, blocks, forward, ranks)
    batches, windows = cut(batches, reconstruction, ranks)
    plan = make_plan(
        "prune_sequentially",
        model,
        pruner,
        batches,
        targets=targets,
        stages=stages,
        allocation=allocation,
        reconstruction=reconstruction,
        device=device,
        ranks=ranks,
    )
    if plan.device is not None and plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
    run = BlockPruning(plan, ranks, min_expert_tokens)
    share_weights(model, ranks)
    if plan.allocation is not None:
        started = time.perf_counter()
        common = {"targets": targets, "blocks": blocks, "device": plan.device, "progress": progress, "ranks": ranks}
        plan = replace(plan, allocation=prepared(plan.allocation, model, batches, pruner, **common))
        run.allocation_seconds = time.perf_counter() - started
    run.tokens = sum(ranks.gather(sum(map(count_tokens, [] if batches is None else batches))))
    peak = _prune_blocks(model, batches, windows, plan, run, ranks, order, show=progress and ranks.rank == 0)
    if not run.layers:
        raise ValueError(
            f"nothing was pruned; all {len(run.skipped)} layers were skipped: {next(iter(run.skipped.values()))}"
        )
    if allocation is not None and ranks.rank == 0:
        warn_of_missed_counts({t.stored_name: run.pruners[name] for name, t in plan.targets.items()}, run.layers)
    return run.report(time.perf_counter() - begin, peak)


def _staged(
    model: nn.Module,
    batches: Iterable[Any] | None,
    targets: Sequence[str] | str | None,
    blocks: str | Sequence[str] | None,
    forward: Callable[[nn.Module, Any], object] | None,
    ranks: Ranks,
) -> tuple[Any, Stages]:
    """Returns the batches, ready to run, and the stages of the model, with the last one called where that is needed."""
    if forward is not None and batches is not None:
        batches = [OwnStep(batch, forward, seed) for seed, batch in enumerate(batches)]
    if batches is not None and not isinstance(batches, Tensor):  # one tensor is refused later, with the other checks
        given = batches
        batches = ranks.attempt(lambda: [named_inputs(batch) for batch in given])
    stages = find_stages(model, blocks)
    # Behind blocks the last layer that is defined makes the output; elsewhere one pass shows which is called last.
    if targets is None and batches is not None and not stages.ends_behind_blocks:
        stages = replace(stages, last=last_called(model, stages, batches, ranks))
    return batches, stages


def _prune_blocks(
    model: nn.Module,
    batches: Iterable[Batch] | None,
    windows: Sequence[tuple[int, int]],
    plan: Plan,
    run: BlockPruning,
    ranks: Ranks,
    order: Order,
    *,
    show: bool,
) -> int:
    """Prunes stage after stage on the outputs of the pruned stages before it; returns the peak memory, in bytes."""

    def source_of(plan: Plan) -> Source:
        if not plan.observed or batches is None:
            return Chain([], ranks)  # of a pruner that needs no inputs
        return calibration_source(model, [part for _, part in plan.blocks], batches, ranks, plan.lists)

    with evaluating(model), layer_progress(len(plan.targets), show) as (bar, task):
        bar.update(task, description="running the first calibration batch")
        if order == "sequential" or plan.allocation is not None:
            source = source_of(plan)
        if plan.reconstruction is not None:
            source.chain("reconstruction", plan.lists)  # before anything is measured
        if plan.allocation is not None:
            bar.update(task, description=f"{type(plan.allocation).__name__}: measuring the dense model")
            started = time.perf_counter()
            run.pruners = allocate(plan.allocation, plan.pruner, plan.reached, plan.targets, source, plan.device, ranks)
            run.allocation_seconds += time.perf_counter() - started
        if order == "at_once":
            plan = replace(plan, blocks=[("", model)], lists=[None])  # one stage, with all targets
            source = source_of(plan)
        rebuilding = None
        if plan.reconstruction is not None:
            rebuilding = Rebuilding(model, plan.reconstruction, windows, source, ranks)
        with closing(source.visits(plan.reached, plan.device)) as visits:
            for visit in visits:
                bar.update(task, description=f"pruning {visit[1] or 'all layers'}")
                _prune_block(
                    plan,
                    run,
                    source,
                    visit,
                    rebuilding,
                    advance=lambda count: bar.advance(task, count),
                    show=lambda text: bar.update(task, description=text),
                )
    if rebuilding is not None:
        rebuilding.rebuilder.finish()
        run.reconstruction, run.untrained = tuple(rebuilding.rebuilder.reports), rebuilding.rebuilder.left
    return peak_memory(visit[3])


def _prune_block(
    plan: Plan,
    run: BlockPruning,
    source: Source,
    visit: Visit,
    rebuilding: Rebuilding | None,
    *,
    advance: Callable[[int], None],
    show: Callable[[str], None],
) -> None:
    """Prunes one stage, reconstructs it, and moves the source on to the next."""
    index, name, block, where = visit
    if rebuilding is not None:
        rebuilding.note_dense(index, block, where)
    here, before = plan.in_block(index), len(run.masks)
    if here:
        seen = plan.calibrated_in_block(index) if plan.calibrated else {}
        statistics = source.collect(plan.pruner.statistic, index, block, seen, where) if seen else {}
        if seen and not statistics and not source.calls(index):
            run.leave_dense(name, here, advance)
        else:
            run.prune(here, statistics, advance)
        del statistics
    if rebuilding is not None:
        rebuilding.train(index, name, block, where, run.masks[before:], show)
    if index < plan.last and plan.runs:
        source.advance(index, block, where)
