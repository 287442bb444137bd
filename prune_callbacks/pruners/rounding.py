"""Common code of pruners that also round: the check of the grid and the width of a sweep."""

from prune_callbacks.solvers.gptq import Grid
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import kept_of_group


def sweep_width(block_size: int, grid: Grid, in_features: int) -> int:
    """Returns how many columns to sweep together, so that a group of the grid lies in one block or begins one."""
    width = grid.width(in_features)
    if width <= block_size:
        return block_size - block_size % width
    return block_size if width == in_features or width % block_size == 0 else width


def check_grid(name: str, grid: Grid, pattern: Pattern) -> None:
    """Raises ValueError for a value that is no `Grid`, or a grid whose groups split groups of the pattern."""
    if not isinstance(grid, Grid):
        raise ValueError(f"{name} takes a grid such as Grid(bits=4, group_size=128), got {grid!r}")
    group = kept_of_group(pattern)
    if group is not None and grid.group_size is not None and grid.group_size % group[1]:
        raise ValueError(
            f"{name}: group_size must be a multiple of the {group[1]} columns that {pattern} masks together, got "
            f"{grid.group_size}"
        )
