"""Trial runs, which change and measure nothing for good."""

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn


class KeptWeights:
    """
    A copy of a module's weights and buffers, to be put back after a trial run.

    Weights that a strategy has sharded since cannot be put back: they are gone when the fit ends.

    Args:
        why: what makes the fit a trial run, for the message.
    """

    def __init__(self, why: str) -> None:
        self._why = why
        self._parameters: dict[nn.Parameter, Tensor] = {}
        self._buffers: dict[tuple[nn.Module, str], Tensor] = {}  # by place: moving a module replaces its buffers

    def add(self, pl_module: LightningModule) -> None:
        """Copies the weights and buffers that were not there before; a module may make some in its own `setup`."""
        for parameter in pl_module.parameters():
            if parameter not in self._parameters:
                self._parameters[parameter] = parameter.detach().cpu().clone()
        for module in pl_module.modules():
            for name, buffer in module.named_buffers(recurse=False):
                self._buffers.setdefault((module, name), buffer.detach().cpu().clone())

    def put_back(self) -> None:
        """Overwrites the weights and buffers with the copies."""
        now = {place: place[0]._buffers.get(place[1]) for place in self._buffers}
        pairs = [*self._parameters.items(), *((now[place], value) for place, value in self._buffers.items())]
        for tensor, value in pairs:
            if tensor is not None and tensor.shape == value.shape and type(tensor.data) is Tensor:
                tensor.data.copy_(value)
        rank_zero_info(f"a trial run ({self._why}): the model has its weights back, and nothing is kept")
