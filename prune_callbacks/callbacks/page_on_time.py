"""Draws the page of a running fit from time to time."""

import time
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from prune_callbacks.reporting.page import write_page
from prune_callbacks.reporting.pictures import draw_report
from prune_callbacks.storage.run_record import RunRecord

DRAWN_EVERY = 30.0
"""Minimum of seconds between two drawings while the model is trained; a drawing takes one to two seconds."""


class PageOnTime:
    """
    Draws a run's page and picture; while the model is trained, at most every `DRAWN_EVERY` seconds.

    Args:
        dirpath: the run's folder.

    Attributes:
        changed: whether the record has changed since the last drawing.
    """

    def __init__(self, dirpath: Path) -> None:
        self.dirpath = dirpath
        self.changed = False
        self._drawn = time.perf_counter()

    def is_due(self) -> bool:
        """Returns whether enough time has passed since the last drawing."""
        return time.perf_counter() - self._drawn > DRAWN_EVERY

    def draw(self, run: RunRecord) -> None:
        """Draws the page and the picture, if the record has changed."""
        if self.changed:
            try:
                draw_report(run, self.dirpath / "report.png")
                write_page(self.dirpath)
            except OSError as error:  # somebody else draws the same page, or the disk is full: training goes first
                rank_zero_warn(f"the page of the run was not drawn: {error}")
        self.changed, self._drawn = False, time.perf_counter()
