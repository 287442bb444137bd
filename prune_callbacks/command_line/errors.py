"""Tells errors that are meant for whoever typed a command from those that nobody foresaw."""

import dis
import errno
import re
from collections.abc import Collection
from types import TracebackType

PLACES = ("prune_callbacks", "hydra", "__main__", "train")
"""Packages whose own ValueErrors are sentences for users."""

OTHERS = ("MisconfigurationException", "UsageError")
"""Errors for users of Lightning and of wandb, which are not imported here."""

CONSTRUCTION = "hydra._internal.target_policy"
"""Hydra's module that calls what a recipe names with `_partial_`."""

FILES = {errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EPERM, errno.EROFS}
"""Errors of the system whose file says enough."""

ADDED = ("full_key:", "object_type=", "reference_type=", "To append to", "Config search path:", "provider=")
"""How lines begin that Hydra and OmegaConf add to what they say."""


def sentence(error: BaseException, given: Collection[str], built: str | None = None) -> str | None:
    """
    Returns what an error says to whoever typed the command; None if its traceback is needed.

    It says something where our code raised it on purpose, where a class that the recipe names refuses its arguments,
    and where a file or a server is not there.

    Args:
        error: the error itself, not one that wraps it.
        given: keys that were set on the command line.
        built: the key of the object in whose construction it was raised; None outside of any.
    """
    frames = _frames(error.__traceback__)
    purpose = bool(frames) and _raises(frames[-1])
    deferred = any(frame.tb_frame.f_globals.get("__name__") == CONSTRUCTION for frame in frames)
    if isinstance(error, ValueError) and purpose and raiser(error) in PLACES:
        return str(error)
    if type(error).__name__ in OTHERS:
        return str(error)
    if isinstance(error, OSError) and error.errno in FILES and error.filename:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, OSError) and error.errno is None and purpose and str(error):  # a library's own sentence
        return f"{built}: {error}" if built else str(error)
    if isinstance(error, TypeError) and (name := re.search(r"unexpected keyword argument '(\w+)'", str(error))):
        keys = [key for key in given if key.rpartition(".")[2] == name[1]]
        if keys:
            return f"{keys[0]}: {error}"
    if built or deferred:
        foreseen = isinstance(error, ValueError | ImportError) or (isinstance(error, TypeError) and purpose)
        return f"{built}: {error}" if foreseen and built else str(error) if foreseen else None
    return None


def raiser(error: BaseException) -> str:
    """Returns the package of the code that an error was raised in, that of OmegaConf and its parser aside."""
    names = [str(frame.tb_frame.f_globals.get("__name__", "")) for frame in _frames(error.__traceback__)]
    packages = [name.partition(".")[0] for name in names]
    return next((name for name in reversed(packages) if name not in ("omegaconf", "antlr4")), "")


def first_lines(error: BaseException) -> str:
    """Returns what Hydra or OmegaConf say of an error, without what they add for programmers."""
    lines = [line.strip() for line in str(error).splitlines()]
    key = next((line.partition(": ")[2] for line in lines if line.startswith("full_key: ")), "")
    said = [line for line in lines if line and not line.startswith(ADDED)]
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", " ".join(said))
    text = text.replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception", "")
    if error.__cause__ is not None and (reason := first_lines(error.__cause__)) not in text:
        text = f"{text} {reason}".strip()
    return f"{key}: {text}" if key else text


def _frames(traceback: TracebackType | None) -> list[TracebackType]:
    """Returns the frames of a traceback, the innermost last."""
    frames = []
    while traceback is not None:
        frames.append(traceback)
        traceback = traceback.tb_next
    return frames


def _raises(frame: TracebackType) -> bool:
    """Returns whether an error was raised by a statement of this frame; else by an operation in it."""
    return frame.tb_frame.f_code.co_code[frame.tb_lasti] == dis.opmap["RAISE_VARARGS"]
