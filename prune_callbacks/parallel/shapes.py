"""The shape of a parameter that a strategy may have partitioned."""

import torch
from torch import Tensor


def whole_shape(parameter: Tensor) -> torch.Size:
    """Returns the unsharded shape of a parameter: `ds_shape` where ZeRO-3 left an empty parameter, else `shape`."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
