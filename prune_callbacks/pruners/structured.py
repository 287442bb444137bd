"""Structured pruning: removes units that several layers write and one layer reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.pruners.joint import check_layers, check_settings
from prune_callbacks.pruners.protocol import Pruned, as_pruned, check_weight, widened
from prune_callbacks.solvers.linalg import damp
from prune_callbacks.solvers.statistics import Gram, Statistic
from prune_callbacks.solvers.structured import cheapest_units, least_squares_on
from prune_callbacks.sparsity import Columns
from prune_callbacks.sparsity.questions import removes_columns
from prune_callbacks.sparsity.selection import keep_largest


@dataclass(frozen=True)
class Structured:
    """
    Removes channels of the MLP and heads of the attention.

    A unit is a row in each layer that writes it (a writer) and a column in the layer that reads it (the reader). The
    units are chosen by the loss of the reader. The reader's remaining columns are then solved for exactly. `shrink`
    makes a smaller model afterwards.

    In the engine (`prune_sequentially`, `OneShotPrune`) the layers of every decoder block are pruned together. The
    writers of `down_proj` are `gate_proj` and `up_proj`. The writer of `o_proj` is `q_proj`; without grouped queries
    also `k_proj` and `v_proj`.

    Args:
        pattern: the share of input features that a reader loses. Attention loses whole heads. With grouped queries,
            every group loses the same number of heads. That number is rounded to the nearest whole number.
        score: "loss": the exact loss of removing a unit, given the units removed before it (ZipLM, Kurtic et al. 2023).
            "wanda": the sum of the reader's Wanda scores over the unit; faster.
        damping: added to the Gram's diagonal, as a fraction of the diagonal's mean; at least 0.

    Raises:
        ValueError: the pattern does not remove columns, or a setting is out of range.
    """

    pattern: Columns
    score: Literal["loss", "wanda"] = "loss"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not removes_columns(self.pattern):
            raise ValueError(f"Structured takes Columns, such as Columns(0.25), got {self.pattern!r}")
        if self.score not in ("loss", "wanda"):
            raise ValueError(f'Structured: score must be "loss" or "wanda", got {self.score!r}')
        check_settings("Structured", self.pattern, None, self.damping)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """Makes an empty Gram of the reader's inputs."""
        return Gram(in_features, device)

    def removed(self, units: int) -> int:
        """Returns how many of `units` units are removed: `sparsity * units`, rounded to the nearest whole number."""
        return round(self.pattern.sparsity * units)

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """Prunes a reader without writers, in units of one feature; see `Pruner`."""
        return self.prune_units(weight, [], statistic, width=1, pools=1)[0]

    def prune_units(
        self,
        reader: Float[Tensor, "out in"],
        writers: Sequence[Float[Tensor, "_ _"]],
        statistic: Statistic | None,
        width: int,
        pools: int,
        removed: int | None = None,
    ) -> list[Pruned]:
        """
        Prunes a reader and its writers together.

        Args:
            reader: the layer with the units as input features.
            writers: the layers with the units as output rows, in the same order.
            statistic: the Gram of the reader's inputs.
            width: the number of features of a unit.
            pools: the number of equal ranges of neighbouring units; every range loses the same number of units.
            removed: that number of units; None: `self.removed` of the units in a range.

        Returns:
            the pruned reader, then the pruned writers. Writers have no loss.

        Raises:
            ValueError: no unit would be left, or a writer has not one row for every input feature of the reader.
        """
        gram = check_layers(self, [reader], statistic)
        for writer in writers:
            check_weight(writer, self.pattern)
            if len(writer) != reader.shape[1]:
                raise ValueError(f"a writer of {len(writer)} rows for a reader of {reader.shape[1]} input features")
        working = widened(reader, gram)
        system = damp(gram.matrix.to(working), self.damping)
        each = reader.shape[1] // width // pools
        removed = self.removed(each) if removed is None else removed
        if removed == each:
            raise ValueError(f"{self.pattern} would leave none of {each} units of {width} features")
        if self.score == "loss":
            keep = cheapest_units(working, system, width, pools, removed)
        else:
            scores = working.abs().sum(0) * gram.squared_norm.to(working).sqrt()
            keep = keep_largest(scores.unflatten(0, (pools, each, width)).sum(-1), each - removed).flatten()
        features = keep.repeat_interleave(width)
        solved = least_squares_on(working, system, features)
        results = [as_pruned(reader, solved, features.expand_as(reader).contiguous(), gram)]
        for writer in writers:
            rows = features.to(writer.device)[:, None].expand_as(writer).contiguous()
            results.append(as_pruned(writer, writer, rows, None))
        return results
