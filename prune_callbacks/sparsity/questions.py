"""
Optional attributes and methods of a pattern, with their defaults.

None of them is part of the Protocol `Pattern`. Each is read by one function of this module.

| attribute or method | type | default | read by |
|---|---|---|---|
| `unit` | 1: any number of single weights may be removed | none | allocations, global `IterativePrune`, SparseGPT |
| `kept_of_group` | `(n, m)`: n of m consecutive weights | `None` | MRP's mask M, SparseGPT, grids, and see below |
| `column_group` | int: neighbouring columns masked together | 1 | block sizes of SparseGPT and MRP |
| `removes_rows` | bool | `False` | MRP, ALPS; `check_contract` |
| `removes_columns` | bool | `False` | `Structured` |
| `at(sparsity)` | returns a pattern | replaces the field `sparsity` | `IterativePrune`, allocations |
| `in_pool(pool)` | returns a pattern | the pattern itself | score pruners, `IterativePrune(scope="layer")` |
| `with_exact_total(pool)` | returns a pattern | the pattern itself | allocations |

`kept_of_group` is also read by `LagrangianAllocation`, permuting, 2:4 conversion and packing. SparseGPT stands for
`SparseGPTQ` too.

These refuse a pattern, with a ValueError:

- without `unit = 1`: allocations (`LagrangianAllocation` also takes `NM`) and `IterativePrune(scope="global")`
- with neither `unit = 1` nor `kept_of_group`: `SparseGPT`, `SparseGPTQ` (so they refuse `Rows`)
- without `kept_of_group`: `MRP` variants "MM" and "MS", `permute_channels_`, `PermuteChannels`, `SemiStructuredConvert`
- with `removes_rows`: `MRP`, `ALPS`; without `removes_columns`: `Structured`
- with neither `at` nor a field `sparsity`: `IterativePrune` and allocations
"""

from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, cast

from prune_callbacks.sparsity.patterns import Pattern

Pool = Literal["row", "layer"]
"""The weights that a pruner compares with each other: the weights of a row, or of the whole layer."""

P = TypeVar("P", bound=Pattern)


def column_group(pattern: Pattern) -> int:
    """Returns the number of neighbouring columns masked together: m of N:M, the side of a block; 1 by default."""
    return int(getattr(pattern, "column_group", 1))


def kept_of_group(pattern: Pattern) -> tuple[int, int] | None:
    """Returns `(n, m)` of a pattern that keeps n of every m consecutive weights; None, the default, for any other."""
    kept: tuple[int, int] | None = getattr(pattern, "kept_of_group", None)
    return kept


def removes_rows(pattern: Pattern) -> bool:
    """Returns whether the pattern may remove all weights of a row; False by default."""
    return bool(getattr(pattern, "removes_rows", False))


def removes_columns(pattern: Pattern) -> bool:
    """Returns whether the pattern removes whole input features, and nothing else; False by default."""
    return bool(getattr(pattern, "removes_columns", False))


def removes_single_weights(pattern: Pattern) -> bool:
    """Returns whether the pattern may remove any number of single weights (its `unit` is 1); False by default."""
    return getattr(pattern, "unit", None) == 1


def at_sparsity(pattern: P, sparsity: float) -> P:
    """
    Returns the pattern at another sparsity, by its method `at` or by replacing its dataclass field `sparsity`.

    Raises:
        ValueError: the pattern determines its sparsity (N:M), or has neither the method nor the field.
    """
    if hasattr(pattern, "at"):
        return cast(P, pattern.at(sparsity))
    if is_dataclass(pattern) and "sparsity" in {field.name for field in fields(pattern)}:
        return cast(P, replace(cast(Any, pattern), sparsity=sparsity))
    raise ValueError(
        f"{pattern!r} cannot be changed to another sparsity: make it a dataclass with a field `sparsity`, or "
        "give it a method at(sparsity)"
    )


def in_pool(pattern: P, pool: Pool) -> P:
    """If the pattern leaves the pool open, returns it with the pruner's pool; by default the pattern itself."""
    return cast(P, pattern.in_pool(pool)) if hasattr(pattern, "in_pool") else pattern


def with_exact_total(pattern: P, pool: Pool) -> P:
    """Returns the pattern with a count that is exact to one weight over a layer; by default the pattern itself."""
    return cast(P, pattern.with_exact_total(pool)) if hasattr(pattern, "with_exact_total") else pattern


def keeping(pattern: P, n: int) -> P:
    """Returns the N:M pattern that keeps `n` of every m weights, by its method `keeping`."""
    return cast(P, cast(Any, pattern).keeping(n))
