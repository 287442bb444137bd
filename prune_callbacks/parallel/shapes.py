"""The shape of a parameter that a strategy may have partitioned."""

import torch
from torch import Tensor


def whole_shape(parameter: Tensor) -> torch.Size:
    """Returns a parameter's whole shape. Partitioned by ZeRO-3 it is empty and carries that as `ds_shape`."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
