"""One block at a time: its layers' statistics from what reaches them, and the layers pruned by them."""

import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from prune_callbacks.calibration.blocks import naming, oriented, stored_input_first, weight_shape
from prune_callbacks.calibration.capture import BlockInputs, run_block
from prune_callbacks.calibration.prune_report import LayerReport
from prune_callbacks.pruners import JointPruner, Pruned, Pruner, check_weight
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
        ranks: each has its own batches, and solves its share of the layers.
    """

    def __init__(self, pruner: Pruner, ranks: Ranks) -> None:
        self.pruner = pruner
        self.ranks = ranks
        self.masks: list[MaskSet] = []
        self.layers: list[LayerReport] = []
        self.skipped: dict[str, str] = {}
        self.input_first: set[str] = set()
        self.few_tokens = False

    def note_fused(self, blocks: Sequence[tuple[str, nn.Module]]) -> None:
        """Names weights that are matrices of several layers in one tensor (fused experts): they stay dense."""
        for block_name, block in blocks:
            for name, parameter in block.named_parameters():
                owner = block.get_submodule(name.rpartition(".")[0])
                if parameter.ndim == 3 and not isinstance(owner, CONVOLUTIONS):
                    self.skipped[f"{block_name}.{name}"] = "it holds the weights of several layers in one tensor"
        if self.skipped:
            warnings.warn(
                f"{len(self.skipped)} tensors stay dense, first {next(iter(self.skipped))}: they hold the weights of "
                "several layers (experts) in one tensor, which is not supported",
                stacklevel=3,
            )

    def collect(
        self,
        index: int,
        block: nn.Module,
        layers: dict[str, nn.Module],
        inputs: list[BlockInputs],
        where: torch.device,
    ) -> dict[str, Gram | InputNorm]:
        """Streams the layers' inputs into statistics, over all ranks; layers that get the same tensor share one."""
        found = self.ranks.attempt(lambda: self._observe(index, block, layers, inputs, where))
        return self._reduce(found, where)

    def _observe(
        self,
        index: int,
        block: nn.Module,
        layers: dict[str, nn.Module],
        inputs: list[BlockInputs],
        where: torch.device,
    ) -> dict[str, tuple[str, Gram | InputNorm]]:
        """For every layer the first of those that get the same tensor, and its statistic."""
        statistics: dict[str, Gram | InputNorm] = {}
        leaders: dict[str, str] = {}
        seen: dict[int, tuple[Tensor, str]] = {}
        tokens: Tensor | None = None

        def observe(name: str, x: Tensor) -> None:
            # The tensor is held in `seen` for the length of one pass, so that its id stays its own.
            leader = seen.setdefault(id(x), (x, name))[1]
            if leaders.setdefault(name, leader) != leader:
                raise ValueError(f"{name} shares its input with {leaders[name]} in one batch and not in another")
            if leader != name:
                return
            if name not in statistics:
                made = self.pruner.statistic(x.shape[-1], where)
                assert made is not None
                statistics[name] = made
            if tokens is not None and x.shape[:2] == tokens.shape:
                x = x[tokens]
            elif tokens is not None and x.ndim == 2 and len(x) == tokens.numel():  # OPT's MLP sees flat tokens
                x = x[tokens.flatten()]
            statistics[name].update(x)

        hooks = [
            layer.register_forward_pre_hook(lambda _, args, name=name: observe(name, args[0]))
            for name, layer in layers.items()
        ]
        try:
            for batch in inputs:
                seen.clear()
                tokens = None if batch.tokens is None else batch.tokens.to(where)
                run_block(index, block, batch, where)
        finally:
            for hook in hooks:
                hook.remove()
            seen.clear()
        return {name: (leader, statistics[leader]) for name, leader in leaders.items()}

    def _reduce(
        self, found: dict[str, tuple[str, Gram | InputNorm]], where: torch.device
    ) -> dict[str, Gram | InputNorm]:
        if self.ranks.size == 1:
            return {name: statistic for name, (_, statistic) in found.items()}
        # A rank without batches, or whose batches did not reach a layer (an expert), has nothing to say about it.
        leaders: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for part in self.ranks.gather({name: (lead, len(s.squared_norm)) for name, (lead, s) in found.items()}):
            for name, (leader, size) in part.items():
                if leaders.setdefault(name, leader) != leader:
                    raise ValueError(f"{name} shares its input with {leader} on one rank and not on another")
                sizes[leader] = size
        reduced: dict[str, Gram | InputNorm] = {}
        for leader, size in sizes.items():
            statistic = found[leader][1] if leader in found else self.pruner.statistic(size, where)
            assert statistic is not None
            statistic.reduce(self.ranks)
            reduced[leader] = statistic
        return {name: reduced[leader] for name, leader in leaders.items()}

    def prune(
        self,
        layers: dict[str, nn.Module],
        statistics: dict[str, Gram | InputNorm],
        advance: Callable[[int], None],
    ) -> None:
        """Prunes the layers in place, each on one rank, or notes why not; calls `advance` with how many are done."""
        groups = _sharing_an_input(layers, statistics, self.pruner)
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

    def _note(self, name: str, layer: nn.Module, outcome: "_Outcome") -> None:
        if isinstance(outcome, str):
            self.skipped[name] = outcome
            return
        report, masks = outcome
        self.layers.append(report)
        self.masks.append(masks)
        if stored_input_first(layer):
            self.input_first.add(name)

    def _solve(self, layers: dict[str, nn.Module], statistic: Gram | InputNorm | None) -> dict[str, "_Outcome"]:
        """Prunes layers that share their input in place, or says why not."""
        name, first = next(iter(layers.items()))
        if statistic is None and self.pruner.statistic(1) is not None:
            reason = "its forward was never called during calibration, so nothing is known about its inputs"
            warnings.warn(f"{name} stays dense: {reason}. Leave it out of `targets` to silence this.", stacklevel=3)
            return {name: reason}
        if statistic is not None and statistic.tokens < weight_shape(first)[1] and not self.few_tokens:
            self.few_tokens = True
            warnings.warn(
                f"{statistic.tokens} calibration tokens for the {weight_shape(first)[1]} input features of {name}: too "
                "few to tell features apart, and slow to solve for. Use several times as many tokens as features",
                stacklevel=3,
            )
        begin = time.perf_counter()
        weights = [oriented(layer, layer.get_parameter("weight").detach()) for layer in layers.values()]
        for name, weight in zip(layers, weights, strict=True):
            with naming(name):
                check_weight(weight, self.pruner.pattern)
        with naming(", ".join(layers)):
            if isinstance(self.pruner, JointPruner):
                results = self.pruner.prune_together(weights, statistic)
            else:
                results = [self.pruner.prune(weight, statistic) for weight in weights]
        seconds = time.perf_counter() - begin
        rows = sum(len(weight) for weight in weights)
        return {
            name: _replace(name, layer, weight, pruned, statistic, seconds * len(weight) / rows)
            for (name, layer), weight, pruned in zip(layers.items(), weights, results, strict=True)
        }


_Outcome = tuple[LayerReport, MaskSet] | str
"""What became of a layer, or why it was skipped."""


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
    return report, MaskSet({parameter_name: oriented(layer, pruned.keep)})


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
    layers: dict[str, nn.Module], statistics: dict[str, Gram | InputNorm], pruner: Pruner
) -> list[list[str]]:
    """The layers in order, those together that a joint pruner can solve for together."""
    groups: dict[object, list[str]] = {}
    for name, layer in layers.items():
        weight, statistic = layer.get_parameter("weight"), statistics.get(name)
        joint = statistic is not None and isinstance(pruner, JointPruner)
        groups.setdefault((id(statistic), weight.dtype, weight.device) if joint else name, []).append(name)
    return list(groups.values())


def _relative_loss(weight: Tensor, pruned: Pruned, statistic: Gram | InputNorm | None) -> float | None:
    if pruned.loss is None or not isinstance(statistic, Gram):
        return None
    dense = weight.to(statistic.matrix)
    output = row_dot(dense @ statistic.matrix, dense)
    return pruned.loss / output if output > 0 else 0.0
