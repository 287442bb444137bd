"""Measures how long a fit has trained, without evaluations."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prune_callbacks.storage.run_record import Seconds


class TrainingClock:
    """Measures the wall time of training and of the evaluations in between, in seconds."""

    def __init__(self) -> None:
        self._begin: float | None = None

    def start(self) -> None:
        """Starts to count time as training."""
        self._begin = time.perf_counter()

    def stop(self, seconds: Seconds) -> None:
        """Stops counting and adds the time since `start` to `seconds.recover`."""
        seconds.recover = self.trained(seconds)
        self._begin = None

    def trained(self, seconds: Seconds) -> float:
        """Returns `seconds.recover`, plus the time since `start` unless stopped."""
        return (seconds.recover or 0.0) + (0.0 if self._begin is None else time.perf_counter() - self._begin)

    @contextmanager
    def evaluating(self, seconds: Seconds) -> Iterator[None]:
        """Counts the time of the `with` block as evaluation and not as training."""
        begin = time.perf_counter()
        yield
        taken = time.perf_counter() - begin
        seconds.evaluate = (seconds.evaluate or 0.0) + taken
        if self._begin is not None:
            self._begin += taken
