"""
Writes files and folders atomically: they exist complete or not at all.

Everything is written under a temporary name first. When complete it gets the permissions of a new file (those of the
umask) and is renamed. This module is the only place that renames.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""The suffix of a file or folder that is not complete."""


@contextmanager
def whole_file(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """
    Yields a temporary path in the folder of `path`, and renames it to `path` if the block ends without an error.

    Creates the folder if it does not exist. After an error `path` is unchanged and the temporary file removed.

    Args:
        path: the file.
        durable: also sync file and folder to the disk, so that a power failure leaves the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        apply_umask(partial)
        if durable:
            _sync(partial)
        rename(partial, path, durable=durable)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str, *, durable: bool = False) -> None:
    """Writes a text file in UTF-8; see `whole_file`."""
    with whole_file(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, record: Mapping[str, Any], *, durable: bool = False) -> None:
    """
    Writes a JSON file; see `whole_file`.

    Raises:
        ValueError: the record holds NaN or inf, which JSON cannot represent.
    """
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n", durable=durable)


def rename(old: Path, new: Path, *, durable: bool = False) -> None:
    """Renames a file within its folder. If `durable`, one of the two names exists after a power failure."""
    old.replace(new)
    if durable:
        _sync(new.parent)


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a new folder next to `folder`, and replaces `folder` by it if the block ends without an error."""
    folder = Path(folder).resolve()  # a link stays a link
    partial, old = folder.with_name(folder.name + PARTIAL), folder.with_name(f"{folder.name}.old")
    if old.exists() and not folder.exists():
        rename(old, folder)  # an earlier call was interrupted between its two renames
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    apply_umask(partial)
    if folder.exists():
        rename(folder, old)
    rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def filled_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a new folder next to `folder`, and moves its files into `folder` if the block ends without an error."""
    folder = Path(folder).resolve()
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    apply_umask(partial)
    folder.mkdir(exist_ok=True)
    for file in sorted(partial.iterdir()):
        if file.is_dir():  # tokenizers with several chat templates write one; renaming does not replace a folder
            shutil.rmtree(folder / file.name, ignore_errors=True)
        rename(file, folder / file.name)
    partial.rmdir()


def apply_umask(path: Path) -> None:
    """
    Sets the permissions of a file, or of all files in a folder, to those that `open` gives a new file.

    safetensors leaves its files readable by their owner only, so that another user, a web server or a container could
    not read the model.
    """
    probe = path.with_name(f"{path.name}.mode")
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(mode)


def _sync(path: Path) -> None:
    """Syncs a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs no file opened for reading
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
