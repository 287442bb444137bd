"""A progress bar over layers, with the time left."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def layer_progress(total: int, show: bool, unit: str = "layers") -> Iterator[tuple[Progress, TaskID]]:
    """Shows a bar over `total` layers, or other units, with the time left; yields the bar and its task."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    # A layer may take minutes, so the speed is taken from all that is done.
    with Progress(*columns, disable=not show, speed_estimate_period=86400) as bar:
        yield bar, bar.add_task("pruning", total=total)
