"""Refuses objects of the package `pytorch_lightning`, which has every class of `lightning.pytorch` a second time."""

from collections.abc import Iterable

SECOND = "pytorch_lightning"


def check_import_names(who: str, trainer: object, callbacks: Iterable[object]) -> None:
    """
    Raises ValueError for a trainer, or a ready-made callback beside ours, of the package `pytorch_lightning`.

    The two packages have the same code, but no class of one is a class of the other. So a strategy, a loader, a search
    or a checkpoint of the other package is not recognised. A callback of the user's own that derives from
    `pytorch_lightning.Callback` itself is accepted: nothing but its hooks is used.

    Args:
        who: class name of the callback that checks.
        trainer: the trainer.
        callbacks: its callbacks.
    """
    if _second(trainer):
        raise ValueError(
            f"{who} got a {SECOND}.Trainer and works with lightning.pytorch.Trainer only, which is another class. "
            f"Import one of the two packages: write `import lightning.pytorch as pl` in place of `import {SECOND} as "
            "pl`, for the module and the data module too"
        )
    foreign = sorted({type(callback).__name__ for callback in callbacks if _second(callback)})
    if foreign:
        raise ValueError(
            f"{who} stands beside {', '.join(foreign)} of {SECOND}.callbacks in a lightning.pytorch.Trainer, which "
            f"does not know the classes of {SECOND}; import {', '.join(foreign)} from lightning.pytorch.callbacks"
        )


def _second(thing: object) -> bool:
    """Returns whether a class of the second package, other than the bare `Callback`, is among an object's classes."""
    return any(k.__module__.split(".")[0] == SECOND and k.__name__ != "Callback" for k in type(thing).__mro__)
