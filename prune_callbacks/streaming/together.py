"""Keeps processes apart that would write into one folder, and together those that share it."""

import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.streaming.files import write_json
from prune_callbacks.writing import PARTIAL

PATIENCE = 30.0
"""Seconds in which a file that rank 0 has written must show on all ranks: a shared file system may take a while."""


@contextmanager
def alone(target: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """
    Locks a folder, which it creates if needed, for rank 0 and those that share its work; a collective.

    Raises:
        ValueError: another process is pruning into it.
    """
    with ExitStack() as stack:
        ranks.attempt(lambda: stack.enter_context(_locked(target)) if ranks.rank == 0 else None)
        yield


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    target.mkdir(parents=True, exist_ok=True)
    folder = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is pruning into {target}; wait for it, or choose another target"
            ) from error
        except OSError as error:
            warnings.warn(
                f"the file system of {target} has no locks ({error.strerror}): make sure that no other process prunes "
                "into it",
                stacklevel=2,
            )
        yield
    finally:
        os.close(folder)


def check_same_folder(folder: Path, ranks: Ranks) -> None:
    """Raises ValueError if a rank does not see what rank 0 writes into a folder; a collective."""
    if ranks.size == 1:
        return
    mark = ranks.share(uuid4().hex)
    path = folder / f"seen_by_all_ranks{PARTIAL}"
    ranks.first(lambda: write_json(path, {"mark": mark}))

    def look() -> None:
        last = time.monotonic() + PATIENCE
        while not (path.is_file() and json.loads(path.read_text(encoding="utf-8"))["mark"] == mark):
            if time.monotonic() > last:
                raise ValueError(
                    f"what rank 0 has written into {folder} does not show here: all ranks must share one folder. "
                    "Choose a target on a file system of all machines"
                )
            time.sleep(0.2)

    try:
        ranks.attempt(look)
    finally:
        ranks.first(path.unlink)
