"""The declared order of callbacks: what each wants of the others, and where."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """
    How many callbacks of some kinds a callback wants, and where.

    Attributes:
        who: class name of the callback whose rule it is.
        count: how many of `kinds` there must be: none, one, some (at least one), or at most one.
        kinds: class names; subclasses count.
        where: on which side of `who`.
        text: the error; `{found}` is replaced by the names of `who` and `kinds` that are there, `{all}` by all names,
            `{wrong}` by those of `kinds` on that side.
        beside: the rule applies only if one of these is there; empty: always.
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

RULES = (
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
        "IterativePrune decides which weights go, and needs MaskEnforcer() after it among the callbacks to keep them "
        "at zero; found {all}",
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
        "LoRARecovery must stand after OneShotPrune among the callbacks: it adapts what was pruned",
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
        "ShrinkModel tries at the start what it will do at the end; put it before LoRARecovery, whose adapters are in "
        "the way then and merged at the end",
    ),
    Rule(
        "ShrinkModel",
        "some",
        ("LoRARecovery", "MaskEnforcer"),
        "anywhere",
        "ShrinkModel takes out what is zero when training ends, and without MaskEnforcer() training may bring it back; "
        "add it to the callbacks",
    ),
    Rule(
        "SparsityMonitor",
        "some",
        ("MaskEnforcer",),
        "anywhere",
        "SparsityMonitor counts what MaskEnforcer holds, and there is none among the callbacks",
    ),
    Rule(
        "QuantizeWeights",
        "some",
        ("LoRARecovery", "MaskEnforcer"),
        "anywhere",
        "QuantizeWeights keeps the zeros that are left when training ends, and without MaskEnforcer() training brings "
        "them all back; add it to the callbacks",
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
        "SemiStructuredConvert stands before {wrong}, which would meet converted weights; put it behind them",
    ),
)
"""What each callback wants of the others. One that is not named here may stand anywhere."""
