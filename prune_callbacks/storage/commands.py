"""The shell line that repeats a run."""

import shlex
from collections.abc import Sequence
from pathlib import Path


def repeat_command(argv: Sequence[str]) -> str | None:
    """Returns the shell line that repeats a run of train.py in a new folder; None if `argv` is of another program."""
    if not argv or Path(argv[0]).name != "train.py":
        return None
    left_out = ("output_dir", "ckpt_path")
    return shlex.join(
        [
            "python",
            "train.py",
            *(argument for argument in argv[1:] if argument.split("=")[0].lstrip("+") not in left_out),
        ]
    )
