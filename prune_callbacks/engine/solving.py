"""One block at a time: its layers' statistics from what reaches them, and the layers pruned by them."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from prune_callbacks.anatomy.blocks import (
    naming,
    oriented,
    parameter_name,
    stored_input_first,
    stored_name,
    weight_shape,
)
from prune_callbacks.anatomy.coupling import Coupled
from prune_callbacks.anatomy.experts import ExpertWeight, dense_in_mixtures, not_seen, told_dense
from prune_callbacks.engine.report import LayerReport
from prune_callbacks.pruners import JointPruner, Magnitude, Pruned, Pruner, Structured, check_weight
from prune_callbacks.ranks import Ranks
from prune_callbacks.solvers import Gram, InputNorm
from prune_callbacks.solvers.linalg import quadratic_form
from prune_callbacks.sparsity import MaskSet


def takes_experts(pruner: Pruner) -> bool:
    """Whether a pruner takes fused experts: coupled units and grids are known for linear layers only."""
    return not isinstance(pruner, Structured) and not hasattr(pruner, "grid")


class BlockPruning:
    """
    The two steps taken for every block, on one rank or many, and the results gathered so far.

    Args:
        pruner: of the layers.
        ranks: each solves its share of the layers.
        coupled: for `Structured`: which layers go together.
        removed: and how many units from every pool, by reader.
        min_expert_tokens: an expert that fewer tokens reach is pruned by Magnitude.
    """

    def __init__(
        self,
        pruner: Pruner,
        ranks: Ranks,
        coupled: Sequence[Coupled] = (),
        removed: Mapping[str, int] | None = None,
        min_expert_tokens: int = 0,
    ) -> None:
        self.pruner = pruner
        self.min_expert_tokens = min_expert_tokens
        self.ranks = ranks
        self.coupled = {group.reader: group for group in coupled}
        self.removed = removed or {}
        self.pruners: dict[str, Pruner] = {}  # of layers with a pattern of their own
        self.masks: list[MaskSet] = []
        self.layers: list[LayerReport] = []
        self.skipped: dict[str, str] = {}
        self.by_magnitude: dict[str, int] = {}
        self.scales: dict[str, Tensor] = {}
        self.input_first: set[str] = set()
        self.few_tokens = False

    def note_dense(self, blocks: Sequence[tuple[str, nn.Module]], chosen: Mapping[str, nn.Module]) -> None:
        """
        Names what stays dense in mixtures of experts: routers, and experts in one tensor that are not targets.

        Raises:
            ValueError: experts are packed.
        """
        fused, deciding = dense_in_mixtures(blocks, chosen)
        self.skipped |= fused | deciding
        for told in told_dense(fused, deciding):
            warnings.warn(told, stacklevel=3)

    def prune(
        self,
        layers: dict[str, nn.Module],
        statistics: dict[str, Gram | InputNorm],
        advance: Callable[[int], None],
    ) -> None:
        """Prunes the layers in place, each on one rank, or notes why not; calls `advance` with how many are done."""
        statistics = self._without_few(layers, statistics)
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
        experts: dict[str, dict[str, MaskSet]] = {}
        for name, layer in layers.items():
            masks = self._note(stored_name(name, layer), layer, everything[name])
            if masks is not None and isinstance(layer, ExpertWeight):
                experts.setdefault(parameter_name(name, layer), {})[name] = masks
            elif masks is not None:
                self.masks.append(masks)
        self.masks += [_joined(fused, layers, parts) for fused, parts in experts.items()]

    def _without_few(
        self, layers: dict[str, nn.Module], statistics: dict[str, Gram | InputNorm]
    ) -> dict[str, Gram | InputNorm]:
        """Leaves experts that hardly a token reached to Magnitude, naming them; the statistics of all others."""
        few: dict[str, dict[str, int]] = {}
        seen = {parameter_name(name, layers[name]) for name in statistics if name in layers}
        for name, layer in layers.items():
            # Of no expert of the tensor anything was seen: that is no matter of tokens, and told when it is solved.
            fused = parameter_name(name, layer)
            if isinstance(layer, ExpertWeight) and fused in seen and self._pruner_of(name).statistic(1) is not None:
                tokens = statistics[name].tokens if name in statistics else 0
                if tokens < self.min_expert_tokens:
                    few.setdefault(fused, {})[name] = tokens
                    self.pruners[name] = Magnitude(self._pruner_of(name).pattern)
        for fused, experts in few.items():
            self.by_magnitude |= experts
            if self.ranks.rank == 0:
                told = [f"{name.rpartition('.')[2]} ({tokens} tokens)" for name, tokens in experts.items()]
                rest = f" and {len(told) - 20} more (report.by_magnitude has all)" if len(told) > 20 else ""
                warnings.warn(
                    f"{fused}: too few calibration tokens reached the experts {', '.join(told[:20])}{rest}; fewer than "
                    f"min_expert_tokens={self.min_expert_tokens}, so they are pruned by Magnitude. Use more "
                    "calibration windows",
                    stacklevel=3,
                )
        return {name: s for name, s in statistics.items() if s.tokens or name not in self.by_magnitude}

    def _pruner_of(self, name: str) -> Pruner:
        return self.pruners.get(name, self.pruner)

    def _note(self, name: str, layer: nn.Module, outcome: "_Outcome") -> MaskSet | None:
        if isinstance(outcome, str):
            self.skipped[name] = outcome
            return None
        report, masks, scale = outcome
        if scale is not None:
            self.scales[name] = scale.cpu()
        self.layers.append(report)
        if stored_input_first(layer):
            self.input_first.add(name.rpartition(".")[0] if isinstance(layer, ExpertWeight) else name)
        return masks

    def _solve(self, layers: dict[str, nn.Module], statistic: Gram | InputNorm | None) -> dict[str, "_Outcome"]:
        """Prunes layers that share their input in place, or says why not."""
        leader, first = next(iter(layers.items()))
        pruner = self._pruner_of(leader)
        if statistic is None and pruner.statistic(1) is not None:
            reason = f"{not_seen(first)} during calibration, so nothing is known about its inputs"
            warnings.warn(f"{leader} stays dense: {reason}. Leave it out of `targets` to silence this.", stacklevel=3)
            return dict.fromkeys(layers, reason)
        known = statistic if leader not in self.by_magnitude else None
        if known is not None and known.tokens < weight_shape(first)[1] and not self.few_tokens:
            self.few_tokens = True
            warnings.warn(
                f"{known.tokens} calibration tokens for the {weight_shape(first)[1]} input features of {leader}: "
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
    stored, parameter = stored_name(name, layer), layer.get_parameter("weight")
    relative = _relative_loss(weight, pruned, statistic)
    parameter.data.copy_(oriented(layer, pruned.weight))
    masks = MaskSet({stored: oriented(layer, pruned.keep)})
    report = LayerReport(stored, weight_shape(layer), masks.sparsity(), pruned.loss, relative, seconds)
    return report, masks, pruned.scale


def _joined(fused: str, layers: Mapping[str, nn.Module], parts: Mapping[str, MaskSet]) -> MaskSet:
    """The mask of a tensor of experts from those of its experts; of one that is not among them all is kept."""
    first = layers[next(iter(parts))]
    assert isinstance(first, ExpertWeight)
    keep = torch.ones(first.fused.shape, dtype=torch.bool)
    for name, masks in parts.items():
        keep[int(name.rpartition(".")[2])] = masks[name]
    return MaskSet({fused: keep})


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
    output = quadratic_form(weight.to(statistic.matrix), statistic.matrix)
    return pruned.loss / output if output > 0 else 0.0
