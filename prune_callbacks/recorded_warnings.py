"""Records the warnings of a run, for its report."""

import warnings
from collections.abc import Callable, Iterable
from typing import TextIO

MOST = 50
"""The most texts that are kept; a run with more repeats one warning in varying words."""


class RecordedWarnings:
    """
    Keeps the texts of `UserWarning` and `RuntimeWarning`, each once and in order; warnings are shown as usual.

    Deprecation warnings are not kept: a user of the package cannot act on them.

    It replaces `warnings.showwarning`, of which a process has one. So start one recorder at a time in a process, or
    stop several in the reverse order of their start.

    Args:
        but: further kinds of warnings to leave out, such as a library's hints.

    Attributes:
        texts: the texts that were kept, at most `MOST`.
    """

    def __init__(self, but: type[Warning] | tuple[type[Warning], ...] = ()) -> None:
        self._but = but
        self.texts: list[str] = []
        self._shown: Callable[..., None] | None = None
        self._hear: Callable[..., None] | None = None

    def start(self) -> None:
        """Starts recording; `stop` ends it."""
        self.stop()
        with warnings.catch_warnings():
            pass  # makes Python show warnings again that it has shown before in this process
        shown = warnings.showwarning

        def hear(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if self._hear is hear:  # a later recorder may still call this one after its `stop`
                self._keep(str(message), category)
            shown(message, category, filename, lineno, file, line)

        self._shown, self._hear = shown, hear
        warnings.showwarning = hear

    def stop(self) -> None:
        """Stops recording and restores `warnings.showwarning`; does nothing if it was not started."""
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
        """Inserts the texts of earlier warnings before those that were recorded, each text once."""
        self.texts[:] = list(dict.fromkeys([*texts, *self.texts]))[:MOST]

    def _keep(self, text: str, category: type[Warning]) -> None:
        if not issubclass(category, UserWarning | RuntimeWarning) or issubclass(category, self._but):
            return
        if text not in self.texts and len(self.texts) < MOST:
            self.texts.append(text)
