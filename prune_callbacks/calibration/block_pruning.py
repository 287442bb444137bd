"""One block at a time: its layers' statistics from what reaches them, and the layers pruned by them."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from prune_callbacks.calibration.blocks import naming, oriented, stored_input_first, weight_shape
from prune_callbacks.calibration.coupling import Coupled
from prune_callbacks.calibration.prune_report import LayerReport
from prune_callbacks.pruners import JointPruner, Pruned, Pruner, Structured, check_weight
from prune_callbacks.ranks import Ranks
from prune_callbacks.solvers import Gram, InputNorm
from prune_callbacks.solvers.linalg import row_dot
from prune_callbacks.sparsity import MaskSet

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class BlockPruning:
    """
    The two steps taken for every block, on one rank or many, and the results gathered so far.

    Args:
        pruner: of the layers.
        ranks: each solves its share of the layers.
        coupled: for `Structured`: which layers go together.
        removed: and how many units from every pool, by reader.
    """

    def __init__(
        self, pruner: Pruner, ranks: Ranks, coupled: Sequence[Coupled] = (), removed: Mapping[str, int] | None = None
    ) -> None:
        self.pruner = pruner
        self.ranks = ranks
        self.coupled = {group.reader: group for group in coupled}
        self.removed = removed or {}
        self.pruners: dict[str, Pruner] = {}  # of layers with a pattern of their own
        self.masks: list[MaskSet] = []
        self.layers: list[LayerReport] = []
        self.skipped: dict[str, str] = {}
        self.scales: dict[str, Tensor] = {}
        self.input_first: set[str] = set()
        self.few_tokens = False

    def note_fused(self, blocks: Sequence[tuple[str, nn.Module]]) -> None:
        """Names weights that are matrices of several layers in one tensor (fused experts): they stay dense."""
        fused: dict[str, str] = {}
        for block_name, block in blocks:
            for name, parameter in block.named_parameters():
                owner = block.get_submodule(name.rpartition(".")[0])
                if parameter.ndim == 3 and not isinstance(owner, CONVOLUTIONS):
                    fused[f"{block_name}.{name}"] = "it holds the weights of several layers in one tensor"
        self.skipped |= fused
        if fused:
            warnings.warn(
                f"{len(fused)} tensors stay dense, first {next(iter(fused))}: they hold the weights of "
                "several layers (experts) in one tensor, which is not supported",
                stacklevel=3,
            )

    def prune(
        self,
        layers: dict[str, nn.Module],
        statistics: dict[str, Gram | InputNorm],
        advance: Callable[[int], None],
    ) -> None:
        """Prunes the layers in place, each on one rank, or notes why not; calls `advance` with how many are done."""
        groups = [[c.reader, *c.writers] for reader, c in self.coupled.items() if reader in layers]
        groups = groups or _sharing_an_input(layers, statistics, self._pruner_of)
        owners = _shared_out(
            [_cost([layers[n] for n in names], statistics.get(names[0])) for names in groups], self.ranks
        )

        def solve() -> dict[str, _Outcome]:
            outcomes: dict[str, _Outcome] = {}
            for names, owner in zip(groups, owners, strict=True):
                if owner == self.ranks.rank:
                    outcomes |= self._solve({name: layers[name] for name in names}, statistics.get(names[0]))
                    advance(len(names))
            return outcomes

        parts = self.ranks.gather(self.ranks.attempt(solve))
        advance(sum(len(part) for part in parts) - len(parts[self.ranks.rank]))
        for names, owner in zip(groups, owners, strict=True):
            for name in names:
                self.ranks.broadcast(layers[name].get_parameter("weight").data, owner)
        everything = {name: outcome for part in parts for name, outcome in part.items()}
        for name, layer in layers.items():
            self._note(f"{name}.weight", layer, everything[name])

    def _pruner_of(self, name: str) -> Pruner:
        return self.pruners.get(name, self.pruner)

    def _note(self, name: str, layer: nn.Module, outcome: "_Outcome") -> None:
        if isinstance(outcome, str):
            self.skipped[name] = outcome
            return
        report, masks, scale = outcome
        if scale is not None:
            self.scales[name] = scale.cpu()
        self.layers.append(report)
        self.masks.append(masks)
        if stored_input_first(layer):
            self.input_first.add(name)

    def _solve(self, layers: dict[str, nn.Module], statistic: Gram | InputNorm | None) -> dict[str, "_Outcome"]:
        """Prunes layers that share their input in place, or says why not."""
        leader, first = next(iter(layers.items()))
        pruner = self._pruner_of(leader)
        if statistic is None and pruner.statistic(1) is not None:
            reason = "its forward was never called during calibration, so nothing is known about its inputs"
            warnings.warn(f"{leader} stays dense: {reason}. Leave it out of `targets` to silence this.", stacklevel=3)
            return dict.fromkeys(layers, reason)
        if statistic is not None and statistic.tokens < weight_shape(first)[1] and not self.few_tokens:
            self.few_tokens = True
            warnings.warn(
                f"{statistic.tokens} calibration tokens for the {weight_shape(first)[1]} input features of {leader}: "
                "too few to tell features apart, and slow to solve for. Use several times as many tokens as features",
                stacklevel=3,
            )
        begin = time.perf_counter()
        weights = [oriented(layer, layer.get_parameter("weight").detach()) for layer in layers.values()]
        for name, weight in zip(layers, weights, strict=True):
            with naming(name):
                check_weight(weight, pruner.pattern)
        with naming(", ".join(layers)):
            if isinstance(pruner, Structured):
                group, removed = self.coupled[leader], self.removed[leader]
                results = pruner.prune_units(weights[0], weights[1:], statistic, group.width, group.pools, removed)
            elif isinstance(pruner, JointPruner):
                results = pruner.prune_together(weights, statistic)
            else:
                results = [pruner.prune(weight, statistic) for weight in weights]
        seconds = time.perf_counter() - begin
        rows = sum(len(weight) for weight in weights)
        return {
            name: _replace(name, layer, weight, pruned, statistic, seconds * len(weight) / rows)
            for (name, layer), weight, pruned in zip(layers.items(), weights, results, strict=True)
        }


_Outcome = tuple[LayerReport, MaskSet, Tensor | None] | str
"""What became of a layer, with its scales if it was rounded, or why it was skipped."""


def _replace(
    name: str,
    layer: nn.Module,
    weight: Tensor,
    pruned: Pruned,
    statistic: Gram | InputNorm | None,
    seconds: float,
) -> _Outcome:
    parameter_name, parameter = f"{name}.weight", layer.get_parameter("weight")
    relative = _relative_loss(weight, pruned, statistic)
    parameter.data.copy_(oriented(layer, pruned.weight))
    sparsity = 1 - float(pruned.keep.float().mean())
    report = LayerReport(parameter_name, weight_shape(layer), sparsity, pruned.loss, relative, seconds)
    return report, MaskSet({parameter_name: oriented(layer, pruned.keep)}), pruned.scale


def _cost(layers: Sequence[nn.Module], statistic: Gram | InputNorm | None) -> float:
    """How long solving takes, in no unit: a factorisation and a product with every row, or one look at the weights."""
    shapes = [weight_shape(layer) for layer in layers]
    rows, size = sum(out for out, _ in shapes), shapes[0][1]
    return float(size**2 * (size / 3 + rows) if isinstance(statistic, Gram) else size * rows)


def _shared_out(costs: Sequence[float], ranks: Ranks) -> list[int]:
    """The rank for every cost: the largest first, to whoever has least to do."""
    loads, owners = [0.0] * ranks.size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def _sharing_an_input(
    layers: dict[str, nn.Module], statistics: dict[str, Gram | InputNorm], pruner_of: Callable[[str], Pruner]
) -> list[list[str]]:
    """The layers in order, those together that a joint pruner can solve for together."""
    groups: dict[object, list[str]] = {}
    for name, layer in layers.items():
        weight, statistic, pruner = layer.get_parameter("weight"), statistics.get(name), pruner_of(name)
        joint = statistic is not None and isinstance(pruner, JointPruner)
        together = (id(statistic), weight.dtype, weight.device, repr(pruner.pattern))
        groups.setdefault(together if joint else name, []).append(name)
    return list(groups.values())


def _relative_loss(weight: Tensor, pruned: Pruned, statistic: Gram | InputNorm | None) -> float | None:
    if pruned.loss is None or not isinstance(statistic, Gram):
        return None
    dense = weight.to(statistic.matrix)
    output = row_dot(dense @ statistic.matrix, dense)
    return pruned.loss / output if output > 0 else 0.0
