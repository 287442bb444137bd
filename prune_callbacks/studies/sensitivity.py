"""Measures how much perplexity rises when one layer, or one block, is pruned and all others stay dense."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prune_callbacks.anatomy.names import naming
from prune_callbacks.anatomy.stages import block_stages
from prune_callbacks.anatomy.target import Target
from prune_callbacks.calibration.batches import Batch, named_inputs
from prune_callbacks.calibration.capture import block_output, capture_inputs, forwards_replaced, hidden_of, run_block
from prune_callbacks.calibration.chain import chain_inputs, needing_a_chain
from prune_callbacks.calibration.sources import Chain, evaluating
from prune_callbacks.calibration.stand_ins import BlockInputs, dress_like
from prune_callbacks.engine.plan import make_plan
from prune_callbacks.engine.progress import layer_progress
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.pruners import Magnitude, Pruner
from prune_callbacks.pruners.questions import coupled
from prune_callbacks.ranks import ALONE
from prune_callbacks.results import Result
from prune_callbacks.solvers import Gram
from prune_callbacks.solvers.float64 import in_float64
from prune_callbacks.solvers.linalg import quadratic_form
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.storage.cells import open_results
from prune_callbacks.writing import write_json

Unit = Literal["layer", "block"]
MEASURED = ("increase", "proxy", "shift")


@dataclass(frozen=True)
class Sensitivity(Result):
    """
    The effects of pruning each layer, or each block, alone.

    Attributes:
        unit: "layer" or "block".
        dense: perplexity of the dense model.
        increase: rise in perplexity, by the name of the layer or block; negative where pruning lowered perplexity.
        proxy: squared error of the outputs of the unit's layers on the dense model's inputs, relative to the squared
            norm of their outputs, summed over the unit. Needs no evaluation.
        shift: squared change of the hidden states that leave the block, relative to their squared norm, averaged over
            calibration tokens. Needs one more pass through the block. Unlike `proxy` it depends on the share of the
            unit's output in the residual stream.
    """

    unit: Unit
    dense: float
    increase: Mapping[str, float]
    proxy: Mapping[str, float]
    shift: Mapping[str, float]

    @property
    def rank_correlation(self) -> float:
        """Returns Spearman's rank correlation of `proxy` and `increase` over all units; NaN for fewer than three."""
        return _spearman(self.increase, self.proxy)

    @property
    def shift_rank_correlation(self) -> float:
        """Returns Spearman's rank correlation of `shift` and `increase` over all units; NaN for fewer than three."""
        return _spearman(self.increase, self.shift)


def _spearman(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    if len(one) < 3:
        return float("nan")
    from scipy.stats import spearmanr  # only here: MeasuredAllocation needs no scipy

    return float(spearmanr(list(one.values()), [other[name] for name in one]).statistic)


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    batches: Iterable[Batch],
    windows: Int[Tensor, "windows tokens"],
    pruner: Pruner,
    *,
    unit: Unit = "layer",
    targets: Sequence[str] | str | None = None,
    blocks: str | None = None,
    batch_size: int = 1,
    min_expert_tokens: int = 32,
    path: Path | None = None,
    setting: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """
    Prunes one unit at a time, measures perplexity, and restores the dense weights.

    Equivalent to pruning a fresh copy of the dense model for every unit and measuring its perplexity; here the outputs
    of the blocks before the pruned one are computed once.

    Args:
        model: a causal LM; it is restored bit for bit.
        batches: calibration batches, as in `prune_sequentially`.
        windows: token ids (windows, tokens) on which perplexity is measured; each window is scored on its own.
        pruner: the pruner for every unit.
        unit: "layer" or "block". All experts in one tensor count as one layer with the name of the tensor.
        targets: patterns of layer names; None for all linear layers and experts of the decoder blocks but routers.
        blocks: name of the list of decoder blocks, where it cannot be found.
        batch_size: windows per forward pass.
        min_expert_tokens: an expert that fewer tokens reach is pruned by Magnitude, as in `prune_sequentially`.
        path: a JSON file to which every result is written at once; results in it are not measured again.
        setting: further settings on which the results depend (model, text); a file of another setting is refused.
        progress: show a progress bar.

    Returns:
        increase, proxy and shift of every unit.

    Raises:
        ValueError: before any work: targets, shapes or blocks do not fit, or the file is of another setting. During the
            work: the pruner cannot solve a layer, which the error names.
    """
    if unit not in ("layer", "block"):
        raise ValueError(f'unit must be "layer" or "block", got {unit!r}')
    if coupled(pruner):
        raise ValueError(
            f"{type(pruner).__name__} removes coupled layers' units together; there is no single layer to prune by it"
        )
    plan = make_plan("sensitivity", model, pruner, batches, targets=targets, stages=block_stages(model, blocks))
    described = {"pruner": repr(pruner), "unit": unit, "windows": list(windows.shape)} | dict(setting or {})
    if any(target.routed for target in plan.targets.values()):
        described["min_expert_tokens"] = min_expert_tokens
    results: dict[str, Any] = {"setting": described, "cells": {}} if path is None else open_results(path, described)
    modules = [block for _, block in plan.blocks]
    with evaluating(model), layer_progress(len(plan.targets), progress) as (bar, task):
        with needing_a_chain("sensitivity", model):
            inputs = chain_inputs(model, modules, [named_inputs(batch) for batch in batches])
            shown = capture_inputs(model, modules, windows.split(batch_size))
        if "dense" not in results:
            results["dense"] = perplexity(model, windows, batch_size=batch_size, progress=False)
        for index, (block_name, block) in enumerate(plan.blocks):
            layers = plan.in_block(index)
            units = {block_name: layers} if unit == "block" and layers else _units(layers)
            left = {name: members for name, members in units.items() if not _complete(results["cells"].get(name, {}))}
            bar.update(task, description=f"sensitivity of {block_name}", advance=len(layers) if not left else 0)
            where = next(block.parameters()).device
            statistics = Chain(inputs, ALONE).collect(Gram, index, block, layers, where) if left else {}
            outputs = [run_block(index, block, batch, where) for batch in inputs] if left else []
            for name, members in left.items():
                with _pruned(members, statistics, pruner, min_expert_tokens) as proxy:
                    shift = _shift(index, block, inputs, outputs)
                    with _entering(modules, index, shown):
                        value = perplexity(model, windows, batch_size=batch_size, progress=False)
                results["cells"][name] = {"increase": value - results["dense"], "proxy": proxy, "shift": shift}
                if path is not None:
                    write_json(path, results)
                bar.advance(task, len(members))
            for batches_here in (inputs, shown) if index < len(modules) - 1 else ():
                Chain(batches_here, ALONE).advance(index, block, where)
    cells = {name: cell for name, cell in results["cells"].items() if _complete(cell)}
    columns = ({name: cell[key] for name, cell in cells.items()} for key in MEASURED)
    return Sensitivity(unit, results["dense"], *columns)


def _units(layers: Mapping[str, Target]) -> dict[str, dict[str, Target]]:
    """Returns the layers by unit: each layer alone, but all experts of one tensor together."""
    units: dict[str, dict[str, Target]] = {}
    for name, layer in layers.items():
        unit = layer.parameter_name if layer.parts > 1 else name
        units.setdefault(unit, {})[name] = layer
    return units


def _complete(cell: Mapping[str, float]) -> bool:
    """Returns whether a cell has all measurements; older files have no shift."""
    return all(key in cell for key in MEASURED)


def _shift(index: int, block: nn.Module, inputs: Sequence[BlockInputs], dense: Sequence[Tensor]) -> float:
    """Returns the mean over real tokens of the squared change of the block's output, relative to its squared norm."""
    total, count = 0.0, 0
    for batch, before in zip(inputs, dense, strict=True):
        after = run_block(index, block, batch, before.device)
        real = slice(None) if batch.tokens is None else batch.tokens.to(before.device)
        old, new = in_float64(before[real]), in_float64(after[real])
        ratios = (new - old).square().sum(-1) / old.square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny)
        total, count = total + float(ratios.sum()), count + ratios.numel()
    return total / count


@contextmanager
def _pruned(
    layers: Mapping[str, Target],
    statistics: Mapping[str, Statistic],
    pruner: Pruner,
    min_expert_tokens: int,
) -> Iterator[float]:
    """Temporarily prunes layers and yields the sum of their relative losses; restores the weights on exit."""
    dense = {name: layer.matrix().clone() for name, layer in layers.items()}
    loss = 0.0
    try:
        reached = {layer.parameter_name for name, layer in layers.items() if name in statistics}
        for name, layer in layers.items():
            if layer.parameter_name not in reached:
                raise ValueError(f"{name}: {layer.unseen} during calibration; leave it out of `targets`")
            statistic, weight = statistics.get(name), layer.matrix()
            assert statistic is None or isinstance(statistic, Gram)
            few = layer.routed and (statistic is None or statistic.tokens < max(min_expert_tokens, 1))
            with naming(name):
                pruned = Magnitude(pruner.pattern).prune(weight, None) if few else pruner.prune(weight, statistic)
            if statistic is not None:
                loss += _relative_loss(weight, pruned.weight, statistic.matrix)
            layer.assign_(pruned.weight)
        yield loss
    finally:
        for name, layer in layers.items():
            layer.assign_(dense[name])


def _relative_loss(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    before, after = weight.to(gram), pruned.to(gram)
    output = quadratic_form(before, gram)
    return quadratic_form(after - before, gram) / output if output > 0 else 0.0


@contextmanager
def _entering(blocks: Sequence[nn.Module], index: int, batches: Sequence[BlockInputs]) -> Iterator[None]:
    """Temporarily feeds the hidden states in `batches` to block `index`; the blocks before it do not run."""
    place = batches[0].place
    output = block_output(0, blocks[0], batches[0], batches[0].hidden.device)
    returned = dress_like(output, hidden_of(output))
    stored = iter(batches)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return returned(args[place] if isinstance(place, int) else kwargs[place])

    def last(*args: Any, **kwargs: Any) -> Any:
        return returned(next(stored).hidden)

    with forwards_replaced(blocks[:index], [*[forward] * (index - 1), last][:index]):
        yield
