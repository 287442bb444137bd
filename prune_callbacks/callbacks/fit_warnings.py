"""What is warned of during a fit, for its report."""

import warnings
from collections.abc import Callable, Iterable
from typing import TextIO

from lightning.pytorch.utilities.warnings import PossibleUserWarning

MOST = 50
"""Texts that are kept; a fit with more says the same in other words."""


class FitWarnings:
    """
    Keeps the texts of warnings that a user should know, each once and in order; all are shown as they would be.

    Those are `UserWarning` and `RuntimeWarning`; not what libraries are about to change, nor Lightning's hints
    (`PossibleUserWarning`).

    Attributes:
        texts: what was kept.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._shown: Callable[..., None] | None = None
        self._hear: Callable[..., None] | None = None

    def start(self) -> None:
        """Begins to listen; to be stopped by `stop`."""
        self.stop()
        shown = warnings.showwarning

        def hear(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if self._hear is hear:  # else stopped, while another who listens still calls this
                self._keep(str(message), category)
            shown(message, category, filename, lineno, file, line)

        self._shown, self._hear = shown, hear
        warnings.showwarning = hear

    def stop(self) -> None:
        """Listens no more; what showed warnings before does so again."""
        if self._hear is not None and warnings.showwarning is self._hear:
            assert self._shown is not None
            warnings.showwarning = self._shown
        self._hear = self._shown = None

    def put_before(self, texts: Iterable[str]) -> None:
        """Adds what an earlier part of the fit warned of."""
        self.texts[:] = list(dict.fromkeys([*texts, *self.texts]))[:MOST]

    def _keep(self, text: str, category: type[Warning]) -> None:
        if not issubclass(category, UserWarning | RuntimeWarning) or issubclass(category, PossibleUserWarning):
            return
        if text not in self.texts and len(self.texts) < MOST:
            self.texts.append(text)
