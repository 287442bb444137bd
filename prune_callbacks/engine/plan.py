"""Checks all arguments of a pruning and makes the plan, before any work begins."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from prune_callbacks.allocation.measuring import check_allocation
from prune_callbacks.allocation.protocol import Allocation
from prune_callbacks.anatomy.changeable import check_changeable, refuse_overlaps
from prune_callbacks.anatomy.coupling import Coupled, coupled_targets
from prune_callbacks.anatomy.experts import dense_in_mixtures, describe_dense
from prune_callbacks.anatomy.names import belongs
from prune_callbacks.anatomy.resized import planned_removal
from prune_callbacks.anatomy.stages import FROZEN, Stages, in_lists, stage_targets
from prune_callbacks.anatomy.target import Target
from prune_callbacks.anatomy.torch_modules import other_matrices
from prune_callbacks.calibration.batches import Batch
from prune_callbacks.engine.fitting import as_pattern_needs, check_prunable, check_trainable, without_misfits
from prune_callbacks.pruners import Pruner, check_pruner
from prune_callbacks.pruners.questions import coupled, needs_calibration, rounds
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.reconstruction.settings import BlockReconstruction


@dataclass(frozen=True)
class Plan:
    """
    The plan of a pruning: targets, pruner and device. `make_plan` makes it once.

    Attributes:
        blocks: the stages, (name, module), in order: decoder blocks, or single layers.
        pruner: the pruner of all targets.
        targets: the matrices to prune, by full name, in the model's order.
        skipped: the reason for every layer that stays dense, by name.
        coupled: the targets that lose the same units, by the reader's name; empty if the pruner removes no units.
        removed: how many units every pool of a reader loses, by the reader's name; empty for other pruners.
        allocation: gives every target a pattern of its own; None: every target has the pruner's pattern.
        device: the device to move blocks to, one at a time; None: blocks stay on their device.
        lists: for every stage the name of its list of blocks, None for a single layer; see `calibration_source`.
        reconstruction: trains every block after it is pruned; None: blocks stay as the pruner leaves them.
    """

    blocks: Sequence[tuple[str, nn.Module]]
    pruner: Pruner
    targets: Mapping[str, Target]
    skipped: Mapping[str, str] = field(default_factory=dict)
    coupled: Mapping[str, Coupled] = field(default_factory=dict)
    removed: Mapping[str, int] = field(default_factory=dict)
    allocation: Allocation | None = None
    device: torch.device | None = None
    lists: Sequence[str | None] | None = None
    reconstruction: BlockReconstruction | None = None

    @cached_property
    def last(self) -> int:
        """Returns the index of the last block that holds a target."""
        return max(index for index, targets in enumerate(self._by_block) if targets)

    @property
    def reached(self) -> Sequence[tuple[str, nn.Module]]:
        """Returns the stages up to the last one that holds a target."""
        return self.blocks[: self.last + 1]

    @cached_property
    def _by_block(self) -> list[dict[str, Target]]:
        numbers = {name: index for index, (name, _) in enumerate(self.blocks)}
        found: list[dict[str, Target]] = [{} for _ in self.blocks]
        for name, target in self.targets.items():
            parts = name.split(".")
            owner = next(".".join(parts[:i]) for i in range(len(parts) + 1) if ".".join(parts[:i]) in numbers)
            found[numbers[owner]][name] = target
        return found

    @property
    def calibrated(self) -> bool:
        """Returns whether the pruner needs calibration."""
        return needs_calibration(self.pruner)

    @property
    def runs(self) -> bool:
        """Returns whether blocks are run on the calibration batches, pruned ones among them."""
        return self.calibrated or self.reconstruction is not None

    @property
    def observed(self) -> bool:
        """Returns whether anything needs the calibration batches: pruner, reconstruction or allocation."""
        return self.runs or (self.allocation is not None and needs_calibration(self.allocation))

    def in_block(self, index: int) -> dict[str, Target]:
        """Returns the targets of a block, by name."""
        return dict(self._by_block[index])

    def calibrated_in_block(self, index: int) -> dict[str, Target]:
        """Returns the targets of a block that need statistics of their inputs; of coupled layers only the readers."""
        seen = {name: target for name, target in self.in_block(index).items() if target.seen_by != "never"}
        return {name: target for name, target in seen.items() if not self.coupled or name in self.coupled}


def make_plan(
    name: str,
    model: nn.Module,
    pruner: Pruner,
    batches: Iterable[Batch] | None,
    *,
    targets: Sequence[str] | str | None = None,
    stages: Stages,
    allocation: Allocation | None = None,
    reconstruction: BlockReconstruction | None = None,
    device: torch.device | str | None = None,
    ranks: Ranks = ALONE,
    unread: bool = False,
) -> Plan:
    """
    Checks all arguments and makes the plan of a pruning.

    If `targets` is None, warns once of what stays dense. See `prune_sequentially` for the arguments that are not
    explained here.

    Args:
        name: the function or class that received the arguments, for messages.
        model: the model.
        pruner: the pruner of all targets.
        batches: the calibration batches; not read, only compared with None.
        targets: patterns of layer names.
        stages: the stages of the model.
        allocation: spreads sparsity over targets.
        reconstruction: trains blocks after pruning.
        device: the device to work on.
        ranks: the processes; all of them fail if one lacks the device.
        unread: whether the model is on the meta device and its values will be read from files.

    Raises:
        ValueError: an argument is of the wrong kind, or does not fit the model or another argument; the pruner or the
            allocation needs calibration and `batches` is None.
    """
    check_pruner(name, pruner)
    if allocation is not None:
        check_allocation(allocation, pruner)
    if coupled(pruner):
        stages = in_lists(stages)
    found = stages.parts
    for block_name, block in found:
        refuse_compiled(block_name, block)
    chosen, left = stage_targets(model, stages, targets, every_kind=takes_every_kind(pruner))
    skipped = stays_dense(found, chosen, left) | left if targets is None else {}
    frozen = [layer for layer, reason in left.items() if reason == FROZEN]
    if frozen:
        warnings.warn(f"{len(frozen)} layers stay dense, first {frozen[0]}: {FROZEN}", stacklevel=3)
    chosen = {target: as_pattern_needs(chosen[target], pruner.pattern) for target in chosen}
    for target in chosen.values():
        check_changeable(target, unread=unread)
    refuse_overlaps(chosen.values())
    groups: list[Coupled] = []
    removed: dict[str, int] = {}
    if coupled(pruner):
        groups, without = coupled_targets(found, chosen)
        chosen = {target: chosen[target] for target in chosen if target not in without}
        removed = planned_removal(model, groups, chosen, pruner.pattern, coupled(pruner).removed)
        skipped = without | skipped
    if targets is None and not stages.found_in_blocks:
        chosen, misfits = without_misfits(chosen, pruner.pattern)
        skipped |= misfits
    for target in chosen.values():
        check_prunable(target, pruner.pattern, unread=unread)
    if reconstruction is not None:
        check_trainable(chosen, unread=unread)
    where = ranks.attempt(lambda: None if device is None else parsed_device(device))
    by_reader = {group.reader: group for group in groups}
    parts, lists = _with_targets(stages, chosen)
    plan = Plan(parts, pruner, chosen, skipped, by_reader, removed, allocation, where, lists, reconstruction)
    if plan.observed and batches is None:
        asking = pruner if plan.calibrated else reconstruction or allocation
        raise ValueError(f"{type(asking).__name__} needs calibration batches, got None")
    return plan


def _with_targets(stages: Stages, chosen: Mapping[str, Target]) -> tuple[list[tuple[str, nn.Module]], list[str | None]]:
    """Returns the stages without single layers that are no targets, and their lists; blocks stay, linking chains."""
    used = [
        (part, owner)
        for part, owner in zip(stages.parts, stages.lists, strict=True)
        if owner is not None or any(belongs(name, part[0]) for name in chosen)
    ]
    return [part for part, _ in used], [owner for _, owner in used]


def takes_every_kind(pruner: Pruner) -> bool:
    """Returns whether a pruner takes all kinds of targets; those of coupled units or with a grid take linear layers."""
    return not coupled(pruner) and not rounds(pruner)


def stays_dense(
    blocks: Sequence[tuple[str, nn.Module]], chosen: Mapping[str, Target], left: Mapping[str, str]
) -> dict[str, str]:
    """
    Returns the reason for every expert tensor, router and other matrix that stays dense, by name, and warns of them.

    Those in `left` have a reason already.

    Raises:
        ValueError: experts are packed in integers.
    """
    fused, routers = dense_in_mixtures(blocks, chosen)
    others = {name: why for name, why in other_matrices(blocks, chosen).items() if name not in left}
    for text in describe_dense(fused, routers, others):
        warnings.warn(text, stacklevel=4)
    return fused | routers | others


def parsed_device(device: torch.device | str) -> torch.device:
    """Returns the device; raises ValueError if torch knows none of that name, or the GPU does not exist here."""
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is unknown to torch; name one such as 'cpu' or 'cuda:1'") from error
    count = torch.cuda.device_count()
    if parsed.type == "cuda" and (parsed.index or 0) >= count:
        raise ValueError(
            f"device={str(device)!r}, and there {'is' if count == 1 else 'are'} {count or 'no'} CUDA "
            f"device{'' if count == 1 else 's'} that torch {torch.__version__} can use; leave device out for the CPU"
        )
    return parsed


def refuse_compiled(name: str, block: nn.Module) -> None:
    """Raises ValueError for a compiled block, in which hooks cannot see the inputs of layers."""
    if hasattr(block, "_orig_mod") or getattr(block, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"block {name} is compiled, so the inputs of its layers cannot be seen; prune before compiling"
        )
