"""
The rules of the order of callbacks: which other callbacks each one needs or excludes, and on which side.

`Lineup.begins_fit` in lineup.py checks the rules, when a fit begins.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """
    How many callbacks of some kinds must stand before or after a callback; `Lineup.begins_fit` in lineup.py checks it.

    Attributes:
        who: class name of the callback that the rule belongs to; subclasses count.
        count: the required number of callbacks of these `kinds`: none, one, some (at least one), or at most one.
        kinds: class names; subclasses count.
        where: on which side of `who` the callbacks are counted; "anywhere": in the whole list.
        text: the error text. `{all}` is replaced by the names of all callbacks in order, `{found}` by the names of
            `who` and `kinds` in the list, and `{wrong}` by the names of `kinds` on the side `where`.
        beside: the rule applies only if a callback of these class names is in the list; empty: always.
    """

    who: str
    count: Literal["none", "one", "some", "at most one"]
    kinds: tuple[str, ...]
    where: Literal["before", "after", "anywhere"]
    text: str
    beside: tuple[str, ...] = ()


_REPORT = (
    "RunReport needs one OneShotPrune or IterativePrune, or one of each, after it among the callbacks, found {found}"
)
_PERMUTE = "PermuteChannels needs one OneShotPrune after it among the callbacks, found {found}"

AVERAGES = ("WeightAveraging", "StochasticWeightAveraging")
"""Lightning's callbacks that keep averages of the weights; subclasses such as `EMAWeightAveraging` count."""

RULES = (
    Rule(
        "RunReport",
        "none",
        AVERAGES,
        "after",
        "RunReport measures and saves the model when training ends, and {wrong}, after it among the callbacks, then "
        "replaces the weights by their average; put {wrong} before RunReport",
    ),
    Rule(
        "LoRARecovery",
        "none",
        AVERAGES,
        "anywhere",
        "LoRARecovery changes the layers of the model, and {wrong} copies weights by their order; leave out {wrong}",
    ),
    Rule("RunReport", "none", ("RunReport", "OneShotPrune", "IterativePrune"), "before", _REPORT),
    Rule("RunReport", "some", ("OneShotPrune", "IterativePrune"), "after", _REPORT),
    Rule("RunReport", "at most one", ("OneShotPrune",), "anywhere", _REPORT),
    Rule("RunReport", "at most one", ("IterativePrune",), "anywhere", _REPORT),
    Rule("RunReport", "at most one", ("RunReport",), "anywhere", _REPORT),
    Rule("PermuteChannels", "one", ("OneShotPrune",), "after", _PERMUTE),
    Rule("PermuteChannels", "one", ("OneShotPrune",), "anywhere", _PERMUTE),
    Rule("PermuteChannels", "one", ("PermuteChannels",), "anywhere", _PERMUTE),
    Rule(
        "IterativePrune",
        "one",
        ("MaskEnforcer",),
        "after",
        "IterativePrune chooses the weights to remove, and needs MaskEnforcer() after it among the callbacks to "
        "keep them at zero; found {all}",
    ),
    Rule(
        "LoRARecovery",
        "none",
        ("IterativePrune",),
        "anywhere",
        "LoRARecovery freezes the weights that IterativePrune chooses from; prune first, and recover in a fit of its "
        "own",
    ),
    Rule(
        "LoRARecovery",
        "none",
        ("OneShotPrune",),
        "after",
        "LoRARecovery must stand after OneShotPrune among the callbacks: it adapts the pruned layers",
    ),
    Rule(
        "ShrinkModel",
        "some",
        ("OneShotPrune",),
        "before",
        "ShrinkModel needs OneShotPrune before it among the callbacks, found {found}",
    ),
    Rule(
        "ShrinkModel",
        "none",
        ("LoRARecovery",),
        "before",
        "ShrinkModel shrinks a copy at the start as a test; put it before LoRARecovery, whose adapters prevent that "
        "until they are merged at the end",
    ),
    Rule(
        "ShrinkModel",
        "some",
        ("LoRARecovery", "MaskEnforcer"),
        "anywhere",
        "ShrinkModel takes out channels and heads that are zero when training ends, and without MaskEnforcer() "
        "training may change the zeros; add MaskEnforcer() to the callbacks",
    ),
    Rule(
        "SparsityMonitor",
        "some",
        ("MaskEnforcer",),
        "anywhere",
        "SparsityMonitor counts the weights that MaskEnforcer holds at zero, and there is none among the callbacks",
    ),
    Rule(
        "QuantizeWeights",
        "some",
        ("LoRARecovery", "MaskEnforcer"),
        "anywhere",
        "QuantizeWeights keeps the zeros that are left when training ends, and without MaskEnforcer() training "
        "overwrites all of them; add MaskEnforcer() to the callbacks",
        beside=("OneShotPrune", "IterativePrune"),
    ),
    Rule(
        "SemiStructuredConvert",
        "none",
        (
            "OneShotPrune",
            "IterativePrune",
            "LoRARecovery",
            "MaskEnforcer",
            "PermuteChannels",
            "QuantizeWeights",
            "RunReport",
            "ShrinkModel",
        ),
        "after",
        "SemiStructuredConvert stands before {wrong}, which cannot read converted weights; put it after them",
    ),
)
"""The rules of all callbacks. A callback without a rule may stand anywhere."""
