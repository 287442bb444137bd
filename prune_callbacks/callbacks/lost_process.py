"""Reports that another process of a training has ended."""

import logging
import signal
import threading
from types import FrameType

from lightning.pytorch import Trainer

from prune_callbacks.parallel.strategies import lost_a_process
from prune_callbacks.storage.checkpoints import newest_checkpoint


class LostProcessWatch:
    """
    Logs an error that names the newest complete checkpoint when a collective fails because another process has ended.

    The error is logged once. Lightning's handler of SIGTERM begins with a collective, which fails too. A launcher sends
    that signal as soon as a process dies, often before the callbacks have seen the error of the first failed
    collective; the handler's error then replaces that error. So this class wraps the handler: it notes the handler's
    error too, and skips the handler once the loss is logged.

    Args:
        trainer: the trainer of a fit that has started.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._said = False
        self._handler = signal.getsignal(signal.SIGTERM)
        self._watching = (
            trainer.world_size > 1 and callable(self._handler) and threading.current_thread() is threading.main_thread()
        )
        if self._watching:
            signal.signal(signal.SIGTERM, self._terminated)

    def note(self, error: BaseException) -> None:
        """Logs the loss of a process, if the error means one and none was logged before."""
        if self._said or not lost_a_process(error):
            return
        self._said = True
        folder = getattr(self.trainer.checkpoint_callback, "dirpath", None)
        saved = newest_checkpoint(folder) if folder else None
        logging.getLogger(__name__).error(
            "rank %d of %d: another process of the training is gone, after %d optimizer steps. %s",
            self.trainer.global_rank,
            self.trainer.world_size,
            self.trainer.global_step,
            f"Resume with the same settings and ckpt_path={saved}"
            if saved
            else "No complete checkpoint is visible from this machine; ModelCheckpoint() writes them",
        )

    def end(self) -> None:
        """Restores the previous handler of SIGTERM, unless other code has replaced this one."""
        if self._watching and signal.getsignal(signal.SIGTERM) == self._terminated:
            signal.signal(signal.SIGTERM, self._handler)
        self._watching = False

    def _terminated(self, signum: int, frame: FrameType | None) -> None:
        """Calls the previous handler and notes its error; does nothing once the loss is logged."""
        assert callable(self._handler)
        if self._said:
            return  # the handler's collective would fail and cut off the message; the fit ends anyway
        try:
            self._handler(signum, frame)
        except Exception as error:
            self.note(error)
            raise
