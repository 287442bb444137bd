"""Permissions of written files."""

from pathlib import Path


def readable(path: Path) -> None:
    """
    Gives a file, or all files in a folder, the permissions that `open` gives a new file here: those of the umask.

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
