"""
Files and folders that are there whole or not at all.

Everything is written under a temporary name first and renamed when it is complete, with the permissions that a new file
gets here (the umask's). This module is the only place that renames.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""Ends the name of what is not complete."""


@contextmanager
def whole_file(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """
    Yields a temporary path beside `path`, which is renamed to `path` if the block ends without an error.

    The folder is made if there is none. After an error `path` is as it was, and the temporary file is removed.

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
    """Renames within a folder. If `durable`, either name is there after a power failure, never neither."""
    old.replace(new)
    if durable:
        _sync(new.parent)


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a new folder beside `folder`, which replaces it if the block ends without an error."""
    folder = Path(folder)
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
    """Yields a new folder beside `folder`, whose files move into `folder` if the block ends without an error."""
    folder = Path(folder).resolve()
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    apply_umask(partial)
    folder.mkdir(exist_ok=True)
    for file in sorted(partial.iterdir()):
        if file.is_dir():  # of tokenizers with several chat templates; a folder is not replaced by one
            shutil.rmtree(folder / file.name, ignore_errors=True)
        rename(file, folder / file.name)
    partial.rmdir()


def apply_umask(path: Path) -> None:
    """
    Gives a file, or all files in a folder, the permissions that `open` gives a new file here.

    safetensors writes through a temporary file that only its owner may read, and leaves it at that: another user, a
    web server or a container could not read the model.
    """
    probe = path.with_name(f"{path.name}.mode")
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(mode)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
