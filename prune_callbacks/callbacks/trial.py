"""Trial runs, which change and measure nothing for good."""

from collections.abc import Callable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor


def keeping_weights(trainer: Trainer, pl_module: LightningModule, why: str) -> Callable[[], None]:
    """
    Copies the weights and buffers of a module, and returns a function that puts them back after a trial run.

    Weights that a strategy has sharded since are left as they are: they are gone when the fit ends.
    """
    state = [*pl_module.parameters(), *pl_module.buffers()]
    before: list[tuple[Tensor, Tensor]] = [(tensor, tensor.detach().cpu().clone()) for tensor in state]

    def put_back() -> None:
        for tensor, value in before:
            if tensor.shape == value.shape and type(tensor.data) is Tensor:
                tensor.data.copy_(value)
        rank_zero_info(f"a trial run ({why}): the model has the weights again that it had before, and nothing is kept")

    return put_back
