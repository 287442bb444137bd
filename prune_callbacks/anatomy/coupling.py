"""Finds the coupled layers of a decoder block: if one reads fewer features, the others need not compute them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from prune_callbacks.anatomy.target import LINEAR, LayerTarget, Target

MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma
    (("fc1",), "fc2"),  # OPT
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    (("c_fc",), "c_proj"),  # GPT-2
)
"""Names of the layers that write an MLP's channels, and of the one that reads them after elementwise functions."""

READS_HEADS = "o_proj"
"""The layer that reads an attention's heads from `q_proj`, `k_proj`, `v_proj`; a configuration may set their size."""


@dataclass(frozen=True)
class Coupled:
    """
    Layers of a block that must lose the same units: channels of an MLP, or heads of an attention.

    Attributes:
        reader: name of the layer whose input features make up the units.
        writers: names of the layers whose output rows make up the units.
        values: name of the layer whose output the reader reads, repeated for the heads of a group: `v_proj`, or the
            last of the writers.
        width: features of a unit: 1 (a channel), or the size of a head.
        pools: number of equal runs of consecutive units, which must lose the same number each: the groups of query
            heads, else 1.
        grouped: whether several query heads share a head of keys and values, which is kept.
    """

    reader: str
    writers: tuple[str, ...]
    values: str
    width: int
    pools: int
    grouped: bool = False


def find_coupled(blocks: Sequence[tuple[str, nn.Module]]) -> list[Coupled]:
    """
    Returns the coupled layers of all blocks, in order.

    Raises:
        ValueError: a block has no coupled layers of a known kind.
    """
    found: list[Coupled] = []
    # Values that several blocks read (Gemma 3n and 4) cannot shrink with the reader of one block.
    shared = any(_reads_other_values(owner) for _, block in blocks for owner in block.modules())
    for block_name, block in blocks:
        here = [
            coupled
            for name, owner in block.named_modules()
            for coupled in _of(f"{block_name}.{name}" if name else block_name, owner)
            if coupled.width == 1 or not shared
        ]
        if not here:
            raise ValueError(
                f"{block_name} has no coupled layers of a known kind. The known kinds are "
                + ", ".join(f"{' and '.join(writers)} with {reader}" for writers, reader in MLPS)
                + f", and q_proj, k_proj and v_proj with {READS_HEADS}; fused ones are not supported"
            )
        found += here
    return found


def coupled_targets(
    blocks: Sequence[tuple[str, nn.Module]], targets: Mapping[str, Target]
) -> tuple[list[Coupled], dict[str, str]]:
    """
    Returns the coupled layers whose members are all targets, and why each other target is in none of them, by name.

    Raises:
        ValueError: the targets contain coupled layers only in part, or not at all.
    """
    chosen: list[Coupled] = []
    for coupled in find_coupled(blocks):
        members = {coupled.reader, *coupled.writers}
        if members <= targets.keys():
            chosen.append(coupled)
        elif members & targets.keys():
            missing = ", ".join(sorted(members - targets.keys()))
            raise ValueError(
                f"{', '.join(sorted(members & targets.keys()))} can lose whole rows and columns only together with "
                f"{missing}; add these to `targets`"
            )
    if not chosen:
        raise ValueError("none of the targets is coupled with others, so no unit can be removed")
    inside = {name for coupled in chosen for name in (coupled.reader, *coupled.writers)}
    shared = {coupled.values.rpartition(".")[0] for coupled in chosen if coupled.grouped}
    reasons = {
        name: "its heads stay: several query heads share each of them"
        if name.rpartition(".")[0] in shared
        else "it is in no coupled layers of a known kind"
        for name in targets
        if name not in inside
    }
    return chosen, reasons


def _of(name: str, owner: nn.Module) -> list[Coupled]:
    layers = {
        n: LayerTarget.of(f"{name}.{n}", child) for n, child in owner.named_children() if isinstance(child, LINEAR)
    }
    found = []
    for writers, reader in MLPS:
        if {*writers, reader} <= layers.keys():
            if _knows_units(owner, {*writers, reader}, {layers[reader].shape[1]}):
                continue
            names = tuple(f"{name}.{writer}" for writer in writers)
            found.append(Coupled(f"{name}.{reader}", names, names[-1], width=1, pools=1))
    heads = getattr(owner, "head_dim", None)
    if {"q_proj", "k_proj", "v_proj", READS_HEADS} <= layers.keys() and isinstance(heads, int):
        queries, values = layers["q_proj"].shape[0] // heads, layers["v_proj"].shape[0] // heads
        sizes = {queries, queries * heads, values * heads} - {heads}
        known = _knows_units(owner, {"q_proj", "k_proj", "v_proj", READS_HEADS}, sizes)
        if layers[READS_HEADS].shape[1] == queries * heads and not known:
            grouped = queries != values
            together = ["q_proj"] if grouped else ["q_proj", "k_proj", "v_proj"]
            names = tuple(f"{name}.{writer}" for writer in together)
            pools = values if grouped else 1
            found.append(Coupled(f"{name}.{READS_HEADS}", names, f"{name}.v_proj", heads, pools, grouped))
    return found


def _reads_other_values(owner: nn.Module) -> bool:
    """Returns whether an attention reads keys and values that another block computes."""
    children = {child for child, _ in owner.named_children()}
    lacks = {"q_proj", READS_HEADS} <= children and "v_proj" not in children
    return lacks or bool(getattr(owner, "is_kv_shared_layer", False))


def _knows_units(owner: nn.Module, layers: set[str], sizes: set[int]) -> bool:
    """Returns whether a parameter outside the layers has an entry per unit, such as a norm or attention sinks."""
    tensors = [*owner.named_parameters(), *owner.named_buffers()]
    return any(sizes & set(tensor.shape) for name, tensor in tensors if name.split(".")[0] not in layers)
