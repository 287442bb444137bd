"""Whether a fit resumes from a checkpoint, asked in `setup`."""

import sys
from typing import Any

from lightning.pytorch import Trainer


def resumed_checkpoint(trainer: Trainer) -> Any:
    """
    The checkpoint that the running fit will load after `setup`, or None.

    Lightning (2.6) hands `ckpt_path` from `Trainer.fit` to `Trainer._run` as an argument and makes it
    available as `trainer.ckpt_path` only once `setup` is over; until then that holds the value of the fit before. So
    the argument is read from the frame of `_run`. Should a release rename it, `None` is returned: the model is then
    pruned for nothing before the checkpoint overwrites it, and no result changes.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get("ckpt_path")
    return None
