"""The weight of a convolution as a matrix, and the patches that it is multiplied with."""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

from prune_callbacks.anatomy.target import Target

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Types of convolutions whose weight is a target; transposed ones are none."""

NUMBERS = 2**21
"""How many numbers of patches are unfolded at once, at most; fewer if a batch is small."""


@dataclass(frozen=True)
class ConvTarget(Target):
    """
    The weight of a convolution, as the matrix that its input patches are multiplied with.

    The matrix has shape (out, in / groups x kernel), as `weight.flatten(1)`, for patches in the order of
    `torch.nn.functional.unfold`. Of a grouped convolution every group of rows has input features of its own.

    Attributes:
        channels_last: whether the columns are ordered with the input channel running fastest (kernel x in / groups), so
            that consecutive weights belong to consecutive channels at one place of the kernel. N:M patterns need that.
    """

    channels_last: bool = False

    convolution = True

    @classmethod
    def of(cls, name: str, layer: nn.Module) -> "ConvTarget":
        """Makes the target of a convolution with full name `name`."""
        return cls(name, layer, "weight")

    def by_channel(self) -> "ConvTarget":
        return replace(self, channels_last=True)

    @property
    def run(self) -> int:
        layer: Any = self.module
        return int(layer.in_channels // layer.groups)

    @property
    def groups(self) -> int:
        return int(cast(Any, self.module).groups)

    @property
    def depthwise(self) -> bool:  # type: ignore[override]
        return self.groups > 1 and self.groups == self.module.in_channels

    @property
    def parameter_name(self) -> str:
        return f"{self.name}.{self.attribute}"

    def oriented(self, stored: Tensor) -> Tensor:
        return (stored.movedim(1, -1) if self.channels_last else stored).flatten(1)

    def as_stored(self, matrix: Tensor) -> Tensor:
        kernel: tuple[int, ...] = cast(Any, self.module).kernel_size
        if self.channels_last:
            return matrix.view(len(matrix), *kernel, self.run).movedim(-1, 1)
        return matrix.view(len(matrix), self.run, *kernel)

    @property
    def shape(self) -> tuple[int, int]:
        layer: Any = self.module
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)

    @property
    def reading(self) -> Hashable:
        layer: Any = self.module
        how = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
        return (*how, self.channels_last)

    def vectors(self, x: Tensor) -> Iterator[Tensor]:
        """
        Yields the unfolded patches of `x`, (patches, groups x in), in parts of at most about half the numbers of `x`.

        Args:
            x: the input of the convolution, (batch, in, ...) or (in, ...) without a batch dimension.
        """
        layer: Any = self.module
        dims = len(layer.kernel_size)
        samples = x if x.ndim == dims + 2 else x[None]
        if not samples.numel():
            return
        # Half a batch of patches and the padded samples beside it fit into the memory of one batch. The least number
        # keeps enough rows for a fast product where the batch is small.
        numbers = min(NUMBERS, max(2**16, samples.numel() // 2))
        for few in samples.split(max(1, numbers // self._numbers(samples))):
            patches = self._patches(few).unflatten(1, (layer.groups, -1))
            places, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
            columns = (*kernel, 2) if self.channels_last else (2, *kernel)
            rows = patches.permute(0, *places, 1, *columns)
            strip = max(1, numbers * rows.shape[1] // rows.numel())
            for part in rows.split(strip, 1):
                yield part.reshape(-1, layer.groups * self.shape[1])

    def _numbers(self, samples: Tensor) -> int:
        """Returns how many numbers the patches of one sample have, about: those of a convolution of stride 1."""
        return max(1, samples[0].numel() * math.prod(map(int, cast(Any, self.module).kernel_size)))

    def _patches(self, samples: Tensor) -> Tensor:
        """Returns a view of all patches, (batch, in, *places, *kernel), of the padded samples."""
        layer: Any = self.module
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        patches = functional.pad(samples, layer._reversed_padding_repeated_twice, mode=mode)
        kernel = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        for place, (size, step, gap) in enumerate(kernel, start=2):
            patches = patches.unfold(place, (size - 1) * gap + 1, step)[..., ::gap]
        return patches
