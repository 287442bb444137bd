"""What is said when another process of a training is gone."""

import logging
import signal
import threading
from types import FrameType

from lightning.pytorch import Trainer

from prune_callbacks.parallel.strategies import lost_a_process
from prune_callbacks.storage.checkpoints import newest_checkpoint


class LostProcessWatch:
    """
    Names the newest complete checkpoint, once, when a collective fails because another process has ended.

    Lightning's handler of SIGTERM begins with a collective. A launcher sends that signal as soon as it sees a process
    die, often while the error of the first failing collective is on its way to the callbacks, or in their hands; the
    handler's own error then takes its place. So the handler is watched as well, and not called once the loss is known.

    Args:
        trainer: of a fit that has started.
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
        """Says so, if that is what the error means."""
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
            f"Go on with the same settings and ckpt_path={saved}"
            if saved
            else "No complete checkpoint is seen from here; ModelCheckpoint() writes them",
        )

    def end(self) -> None:
        """Puts the handler back, where nobody else has."""
        if self._watching and signal.getsignal(signal.SIGTERM) == self._terminated:
            signal.signal(signal.SIGTERM, self._handler)
        self._watching = False

    def _terminated(self, signum: int, frame: FrameType | None) -> None:
        assert callable(self._handler)
        if self._said:
            return  # nobody is left to tell, and the fit is ending; its collective would cut the message off
        try:
            self._handler(signum, frame)
        except Exception as error:
            self.note(error)
            raise
