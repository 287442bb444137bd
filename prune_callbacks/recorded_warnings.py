"""What is warned of meanwhile, for a report."""

import warnings
from collections.abc import Callable, Iterable
from typing import TextIO

MOST = 50
"""Texts that are kept; who gives more says the same in other words."""


class RecordedWarnings:
    """
    Keeps the texts of warnings that a user should know, each once and in order; all are shown as they would be.

    Those are `UserWarning` and `RuntimeWarning`; not what libraries are about to change.

    One at a time in a process, or stopped in the reverse order: what is listened at is the process's.

    Args:
        but: kinds of warnings that are not kept either, such as a library's hints.

    Attributes:
        texts: what was kept.
    """

    def __init__(self, but: type[Warning] | tuple[type[Warning], ...] = ()) -> None:
        self._but = but
        self.texts: list[str] = []
        self._shown: Callable[..., None] | None = None
        self._hear: Callable[..., None] | None = None

    def start(self) -> None:
        """Begins to listen; to be stopped by `stop`."""
        self.stop()
        with warnings.catch_warnings():
            pass  # lets what was shown before, in the same process, be shown and heard again
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

    def __enter__(self) -> "RecordedWarnings":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def put_before(self, texts: Iterable[str]) -> None:
        """Adds what was warned of earlier."""
        self.texts[:] = list(dict.fromkeys([*texts, *self.texts]))[:MOST]

    def _keep(self, text: str, category: type[Warning]) -> None:
        if not issubclass(category, UserWarning | RuntimeWarning) or issubclass(category, self._but):
            return
        if text not in self.texts and len(self.texts) < MOST:
            self.texts.append(text)
