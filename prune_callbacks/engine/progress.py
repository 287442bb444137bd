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
def layer_progress(total: int, show: bool) -> Iterator[tuple[Progress, TaskID]]:
    """Shows a progress bar over `total` layers, with an estimate of the time left; yields the bar and its task."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show) as bar:
        yield bar, bar.add_task("pruning", total=total)
