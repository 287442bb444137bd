"""Permutes the channels of a model so that N:M keeps a larger score; the outputs of the model stay the same."""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_callbacks.anatomy.blocks import find_blocks
from prune_callbacks.anatomy.changeable import check_changeable
from prune_callbacks.anatomy.computed import why_no_parameter
from prune_callbacks.anatomy.coupling import Coupled, find_coupled
from prune_callbacks.anatomy.names import naming
from prune_callbacks.anatomy.target import LayerTarget
from prune_callbacks.calibration.batches import Batch, named_inputs, run_model
from prune_callbacks.calibration.in_turn import calibration_source
from prune_callbacks.calibration.sources import evaluating
from prune_callbacks.engine.fitting import check_prunable
from prune_callbacks.engine.plan import parsed_device, refuse_compiled
from prune_callbacks.engine.progress import layer_progress
from prune_callbacks.engine.sharing import share_weights
from prune_callbacks.pruners import Wanda
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.results import Result
from prune_callbacks.solvers.float64 import sum_in_float64
from prune_callbacks.solvers.permutation import channel_permutation, kept_score
from prune_callbacks.solvers.precision import full_precision
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import kept_of_group


@dataclass(frozen=True)
class Permuted(Result):
    """
    The gain of permuting a layer: shares of its score `sum (|W_ij| ||X_j||)^2` that N:M keeps, in [0, 1].

    Attributes:
        before: the share in the old order of the input features.
        after: the share in the new order; never smaller.
    """

    before: float
    after: float


@torch.no_grad()
def permute_channels_(
    model: nn.Module,
    batches: Iterable[Batch],
    pattern: Pattern,
    *,
    blocks: str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> dict[str, Permuted]:
    """
    Reorders input channels of a dense model in place so that N:M keeps more of the score (Pool & Yu 2021).

    The outputs of the model stay the same, up to the rounding of sums in another order. Prune afterwards.

    - MLP: reorders the channels, which are columns of the layer that reads them and rows of the layers that write them.
    - Attention: reorders the features inside every head, which are columns of `o_proj` and rows of `v_proj`. All heads
      that share their values (grouped queries) get the same order.
    - Inputs from the residual stream keep their order.

    Args:
        model: a `transformers` causal LM, or a model with coupled layers that `find_coupled` knows.
        batches: token ids (batch, tokens), or mappings with `input_ids` and maybe `attention_mask`.
        pattern: the N:M pattern that the model will be pruned to.
        blocks: name of the list of decoder blocks, where it cannot be found.
        device: the device to run blocks on, one at a time; None: the model's own.
        progress: show a progress bar.
        ranks: processes with the same model, each with its own batches.

    Returns:
        The gain of every permuted layer, by the name of the layer that reads the channels.

    Raises:
        ValueError: the pattern is not N:M, a block is compiled, the model has no coupled layers, a layer does not fit
            the pattern, there is no batch, or the outputs changed.
    """
    if kept_of_group(pattern) is None:
        raise ValueError(f"permute_channels_ takes an N:M pattern such as NM(2, 4), got {pattern!r}")
    found = find_blocks(model, blocks)
    coupled = find_coupled(found)
    for block_name, block in found:
        refuse_compiled(block_name, block)
    for group in coupled:
        _check(model, group, pattern)
    forced = ranks.attempt(lambda: None if device is None else parsed_device(device))
    done: dict[str, Permuted] = {}
    batches = batches if isinstance(batches, Tensor) else [named_inputs(batch) for batch in batches]
    share_weights(model, ranks)
    with evaluating(model), layer_progress(len(coupled), progress and ranks.rank == 0) as (bar, task):
        source = calibration_source(model, [block for _, block in found], batches, ranks)
        dense = [_output_of(model, found[-1][1], batch) for batch in batches[:1]]
        with closing(source.visits(found, forced)) as visits:
            for index, block_name, block, where in visits:
                groups = [group for group in coupled if group.reader.startswith(f"{block_name}.")]
                bar.update(task, description=f"permuting {block_name}")
                with full_precision():  # rounded products differ by as much as outputs that did change
                    before = source.output(index, block, where)
                readers = {group.reader: _target(model, group.reader) for group in groups}
                statistics = source.collect(Wanda(pattern).statistic, index, block, readers, where)
                done |= _permute_groups(model, groups, statistics, pattern, ranks)
                bar.advance(task, len(groups))
                with naming(block_name), full_precision():
                    _check_unchanged(before, source.output(index, block, where))
                if index < len(found) - 1:
                    source.advance(index, block, where)
        # Blocks may be coupled with each other, which the checks of single blocks do not find.
        for batch, output in zip(batches, dense, strict=False):
            _check_unchanged(output, _output_of(model, found[-1][1], batch))
    return done


def _permute_groups(
    model: nn.Module, groups: list[Coupled], statistics: Mapping[str, Statistic], pattern: Pattern, ranks: Ranks
) -> dict[str, Permuted]:
    """Permutes the coupled layers of a block in place, and returns their gains; warns of those that were not seen."""
    done: dict[str, Permuted] = {}
    for group in groups:
        if group.reader in statistics:
            done[group.reader] = _permute(model, group, statistics[group.reader], pattern, ranks)
        else:
            warnings.warn(f"{group.reader} is not permuted: its forward was never called", stacklevel=3)
    return done


@full_precision()
def _output_of(model: nn.Module, block: nn.Module, batch: Batch) -> Tensor:
    """Returns the output of a block in a forward pass of the whole model."""
    seen: list[Any] = []
    hook = block.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        run_model(model, batch)
    finally:
        hook.remove()
    hidden = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
    assert isinstance(hidden, Tensor)
    return hidden


def _check_unchanged(old: Tensor | None, new: Tensor | None) -> None:
    """Raises ValueError if an output differs from before by more than rounding; None: there is none on this rank."""
    if old is None or new is None:
        return
    change = float((new - old).float().norm() / old.float().norm().clamp_min(torch.finfo(torch.float32).tiny))
    allowed = max(1e-3, 8 * torch.finfo(old.dtype).eps)
    if not change <= allowed:
        raise ValueError(
            f"permuting changed the output, by {change:.1e} of its norm: some module depends on the order of "
            "the channels. The model cannot be permuted; load it again"
        )


def _width(model: nn.Module, group: Coupled) -> int:
    """Returns how many neighbouring features may change places: the features of a head, or all channels."""
    return group.width if group.width > 1 else _target(model, group.reader).shape[1]


def _permute(model: nn.Module, group: Coupled, statistic: Statistic, pattern: Pattern, ranks: Ranks) -> Permuted:
    """Reorders the reader's columns and the writers' rows in place, and returns the gain."""
    weight = _target(model, group.reader).matrix()
    scores = (weight.float() ** 2) * statistic.squared_norm.float()
    width = _width(model, group)
    written = _target(model, group.values).shape[0] // width
    # Heads that read the same values must have the same order, so their scores are stacked.
    stacked = scores.unflatten(1, (written, -1, width)).permute(1, 2, 0, 3).flatten(1, 2)
    group_of = kept_of_group(pattern)
    assert group_of is not None
    n, m = group_of
    orders = ranks.attempt(lambda: [channel_permutation(part, n, m) for part in stacked])
    orders = ranks.share(orders)  # rank 0 decides for all
    rows = torch.cat([head * width + order.to(weight.device) for head, order in enumerate(orders)])
    repeats = weight.shape[1] // (written * width)
    heads = [(head * repeats + i, orders[head]) for head in range(written) for i in range(repeats)]
    columns = torch.cat([head * width + order.to(weight.device) for head, order in heads])
    weight.copy_(weight[:, columns])
    for writer in _written(group):
        _reorder_rows(_target(model, writer), rows)
    whole = max(float(sum_in_float64(scores)), torch.finfo(torch.float32).tiny)
    before, after = (kept_score(part, n, m) / whole for part in (scores, scores[:, columns]))
    return Permuted(before, after)


def _written(group: Coupled) -> tuple[str, ...]:
    """Returns the names of the layers whose rows are reordered along with the reader's columns."""
    return group.writers if group.width == 1 else (group.values,)


def _check(model: nn.Module, group: Coupled, pattern: Pattern) -> None:
    """Raises ValueError, naming the layer, if a layer does not fit the pattern or cannot be reordered in place."""
    reader = _target(model, group.reader)
    check_prunable(reader, pattern)
    for name in _written(group):
        check_changeable(_target(model, name))
        layer = model.get_submodule(name)
        why = why_no_parameter(layer, "bias")
        if why is not None and "bias" not in layer._parameters:  # otherwise there is none
            raise ValueError(f"layer {name}: {why}")
    with naming(group.reader):
        pattern.check_shape((reader.shape[0], _width(model, group)))


def _target(model: nn.Module, name: str) -> LayerTarget:
    return LayerTarget.of(name, model.get_submodule(name))


def _reorder_rows(target: LayerTarget, rows: Tensor) -> None:
    """Reorders the rows of a layer's weight, and its bias, in place."""
    target.assign_(target.matrix()[rows])
    bias = target.module.bias
    if isinstance(bias, Tensor):
        bias.data.copy_(bias.data[rows])


def improvement(done: Mapping[str, Permuted]) -> str:
    """Returns a line of text: how many layers were permuted, and how much less of their score N:M loses."""
    before = sum(1 - gain.before for gain in done.values())
    after = sum(1 - gain.after for gain in done.values())
    saved = 1 - after / before if before else 0.0
    return f"permuted the channels of {len(done)} layers: {saved:.1%} less of their score is lost"
