"""Solves the targets of one block, on one rank or many, and gathers the results."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from prune_callbacks.anatomy.names import naming
from prune_callbacks.anatomy.target import Target
from prune_callbacks.engine.by_group import prune_by_group, relative_loss
from prune_callbacks.engine.plan import Plan
from prune_callbacks.engine.report import LayerReport, PruneReport
from prune_callbacks.engine.shares import cost, shared_out, sharing_an_input
from prune_callbacks.pruners import Magnitude, Pruned, Pruner, check_weight
from prune_callbacks.pruners.questions import coupled, joint, needs_calibration
from prune_callbacks.ranks import Ranks
from prune_callbacks.reconstruction.report import BlockReport
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import MaskSet

Statistics = dict[str, Statistic]


class BlockPruning:
    """
    Prunes block after block by the statistics of their inputs, and gathers the results.

    Args:
        plan: the targets, the pruner and the device.
        ranks: the processes, each of which solves its share of the targets.
        min_expert_tokens: an expert that fewer calibration tokens reach is pruned by Magnitude.
    """

    def __init__(self, plan: Plan, ranks: Ranks, min_expert_tokens: int = 0) -> None:
        self.plan = plan
        self.min_expert_tokens = min_expert_tokens
        self.ranks = ranks
        self.pruners: dict[str, Pruner] = {}  # of targets with a pattern of their own
        self.masks: list[MaskSet] = []
        self.layers: list[LayerReport] = []
        self.skipped: dict[str, str] = dict(plan.skipped)
        self.by_magnitude: dict[str, int] = {}
        self.scales: dict[str, Tensor] = {}
        self.input_first: set[str] = set()
        self.convolutions: dict[str, int] = {}
        self.reconstruction: tuple[BlockReport, ...] = ()
        self.untrained: dict[str, str] = {}
        self.tokens = 0
        self.allocation_seconds = 0.0
        self.few_tokens = False

    def prune(self, targets: dict[str, Target], statistics: Statistics, advance: Callable[[int], None]) -> None:
        """
        Prunes targets in place, each on one rank, or records why a target is skipped; a collective of the ranks.

        Args:
            targets: the targets of one block, by name.
            statistics: the statistics of the targets' inputs, by name.
            advance: called with the number of targets finished since the last call.
        """
        statistics = self._without_few(targets, statistics)
        self._never_seen(targets)
        groups = [[c.reader, *c.writers] for reader, c in self.plan.coupled.items() if reader in targets]
        groups = groups or sharing_an_input(targets, statistics, self._pruner_of)
        owners = shared_out(
            [cost([targets[n] for n in names], statistics.get(names[0])) for names in groups], self.ranks
        )

        def solve() -> dict[str, _Outcome]:
            outcomes: dict[str, _Outcome] = {}
            for names, owner in zip(groups, owners, strict=True):
                if owner == self.ranks.rank:
                    outcomes |= self._solve({name: targets[name] for name in names}, statistics.get(names[0]))
                    advance(len(names))
            return outcomes

        parts = self.ranks.gather(self.ranks.attempt(solve))
        advance(sum(len(part) for part in parts) - len(parts[self.ranks.rank]))
        for names, owner in zip(groups, owners, strict=True):
            for name in names:
                self.ranks.broadcast(targets[name].stored, owner)
        self._note(targets, {name: outcome for part in parts for name, outcome in part.items()})

    def report(self, seconds: float, peak_memory_bytes: int) -> PruneReport:
        """Returns the results of all blocks so far."""
        return PruneReport(
            MaskSet.join(self.masks),
            tuple(self.layers),
            self.skipped,
            seconds,
            peak_memory_bytes,
            frozenset(self.input_first),
            self.scales,
            self.by_magnitude,
            self.convolutions,
            self.reconstruction,
            self.untrained,
            self.tokens,
            self.allocation_seconds,
        )

    def leave_dense(self, block: str, targets: Mapping[str, Target], advance: Callable[[int], None]) -> None:
        """Records that no target of a block is pruned because the model never calls the block, and warns once."""
        reason = "its forward was never called during calibration, so nothing is known about its inputs"
        self.skipped |= {target.stored_name: f"{block}: {reason}" for target in targets.values()}
        if self.ranks.rank == 0:
            warnings.warn(f"{block} stays dense: {reason}", stacklevel=3)
        advance(len(targets))

    def _without_few(self, targets: dict[str, Target], statistics: Statistics) -> Statistics:
        """
        Assigns Magnitude to experts that too few tokens reached, and warns with their names.

        Returns:
            the statistics, without those of experts that no token reached.
        """
        few: dict[str, dict[str, int]] = {}
        seen = {targets[name].parameter_name for name in statistics if name in targets}
        for name, target in targets.items():
            # If no expert of the tensor has statistics, tokens are not the reason; `_solve` reports it.
            fused = target.parameter_name
            if target.routed and fused in seen and needs_calibration(self._pruner_of(name)):
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

    def _never_seen(self, targets: Mapping[str, Target]) -> None:
        """Assigns Magnitude to matrices whose inputs no calibration sees, and warns with the first of their names."""
        never = [n for n, t in targets.items() if t.seen_by == "never" and needs_calibration(self._pruner_of(n))]
        for name in never:
            self.pruners[name] = Magnitude(self._pruner_of(name).pattern)
            self.by_magnitude[name] = 0
        if never and self.ranks.rank == 0:
            warnings.warn(
                f"{', '.join(never[:3])}{f' and {len(never) - 3} more' if len(never) > 3 else ''}: "
                f"{targets[never[0]].unseen}, so they are pruned by Magnitude (report.by_magnitude has all)",
                stacklevel=3,
            )

    def _pruner_of(self, name: str) -> Pruner:
        """Returns the pruner of a target: the plan's, unless an allocation or Magnitude replaced it."""
        return self.pruners.get(name, self.plan.pruner)

    def _note(self, targets: Mapping[str, Target], outcomes: Mapping[str, "_Outcome"]) -> None:
        """Records the outcomes of a block's targets, in order; joins the masks of targets in one parameter."""
        shared: dict[str, dict[str, Tensor]] = {}
        for name, target in targets.items():
            outcome = outcomes[name]
            if isinstance(outcome, str):
                self.skipped[target.stored_name] = outcome
                continue
            report, masks, scale = outcome
            if scale is not None:
                self.scales[target.stored_name] = scale.cpu()
            self.layers.append(report)
            if target.input_first:
                self.input_first.add(target.parameter_name)
            if target.convolution:
                self.convolutions[target.parameter_name] = target.groups
            if target.parts > 1:
                shared.setdefault(target.parameter_name, {})[name] = masks[target.stored_name]
            else:
                self.masks.append(masks)
        self.masks += [_joined_mask(holder, targets, keeps) for holder, keeps in shared.items()]

    def _solve(self, targets: dict[str, Target], statistic: Statistic | None) -> dict[str, "_Outcome"]:
        """Prunes targets that share their input in place; returns an outcome for each."""
        leader, first = next(iter(targets.items()))
        pruner = self._pruner_of(leader)
        if statistic is None and needs_calibration(pruner):
            reason = f"{first.unseen} during calibration, so nothing is known about its inputs"
            warnings.warn(f"{leader} stays dense: {reason}. Leave it out of `targets` to silence this.", stacklevel=3)
            return dict.fromkeys(targets, reason)
        known = statistic if leader not in self.by_magnitude else None
        if known is not None and known.tokens < first.shape[1] and not self.few_tokens:
            self.few_tokens = True
            warnings.warn(
                f"{known.tokens} calibration tokens for the {first.shape[1]} input features of {leader}: "
                "too few to tell features apart, and slow to solve for. Use several times as many tokens as features",
                stacklevel=3,
            )
        begin = time.perf_counter()
        weights = [target.matrix() for target in targets.values()]
        for name, weight in zip(targets, weights, strict=True):
            with naming(name):
                for part in weight.chunk(first.groups):
                    check_weight(part, pruner.pattern)
        with naming(", ".join(targets)):
            results = self._results(leader, pruner, weights, statistic)
            relative = [relative_loss(w, pruned, statistic) for w, pruned in zip(weights, results, strict=True)]
        seconds = time.perf_counter() - begin
        rows = sum(len(weight) for weight in weights)
        return {
            target.name: _assign(target, pruned, loss, seconds * len(pruned.weight) / rows)
            for target, pruned, loss in zip(targets.values(), results, relative, strict=True)
        }

    def _results(
        self, leader: str, pruner: Pruner, weights: Sequence[Tensor], statistic: Statistic | None
    ) -> list[Pruned]:
        """Calls `prune_units` for coupled layers, `prune_together` for layers with one input, else `prune` for each."""
        by_units, together = coupled(pruner), joint(pruner)
        if by_units is not None:
            group, removed = self.plan.coupled[leader], self.plan.removed[leader]
            pruned: list[Pruned] = by_units.prune_units(
                weights[0], weights[1:], statistic, group.width, group.pools, removed
            )
            return pruned
        if together is not None and self.plan.targets[leader].groups == 1:
            return together.prune_together(weights, statistic)
        return [prune_by_group(pruner, weight, statistic, self.plan.targets[leader].groups) for weight in weights]


_Outcome = tuple[LayerReport, MaskSet, Tensor | None] | str
"""The report, mask and scales (None unless rounded) of a pruned target, or the reason why it was skipped."""


def _assign(target: Target, pruned: Pruned, relative: float | None, seconds: float) -> _Outcome:
    """Writes the pruned weight into the target and returns the outcome."""
    target.assign_(pruned.weight)
    masks = MaskSet({target.stored_name: target.as_stored(pruned.keep)})
    report = LayerReport(target.stored_name, target.shape, masks.sparsity(), pruned.loss, relative, seconds)
    return report, masks, pruned.scale


def _joined_mask(holder: str, targets: Mapping[str, Target], keeps: Mapping[str, Tensor]) -> MaskSet:
    """Joins the masks of targets that share a parameter; the rest of the parameter is kept whole."""
    keep = torch.ones(targets[next(iter(keeps))].parameter.shape, dtype=torch.bool)
    for name, mask in keeps.items():
        targets[name].part_of(keep).copy_(mask)
    return MaskSet({holder: keep})
