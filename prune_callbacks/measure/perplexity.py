"""Computes perplexity over fixed windows, one batch at a time."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel

from prune_callbacks.calibration.checks import check_ids, check_window_length
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.solvers.float64 import float64_device, in_float64


class Perplexity(Metric):
    """
    The perplexity, `exp` of the mean negative log-likelihood per token, as a torchmetrics metric.

    Equivalent to `torchmetrics.text.Perplexity(ignore_index=-100)`, but uses log-softmax, one window at a time: a
    probability that underflows in softmax does not make perplexity infinite, and the logits of a batch are never copied
    as a whole. The sum is float64, and stays on the CPU where the device has no float64.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        """Moves or casts the states as torchmetrics does, but no float64 to a device that has none."""
        device = fn(torch.zeros(1, device=self.device)).device

        @wraps(fn)  # torchmetrics knows casts by their names, and leaves the states as they are then
        def apply(tensor: Tensor) -> Tensor:
            return (
                in_float64(tensor) if tensor.dtype is torch.float64 and device != float64_device(device) else fn(tensor)
            )

        moved: nn.Module = super()._apply(apply, *args, **kwargs)
        return moved

    def update(self, logits: Float[Tensor, "batch tokens vocab"], labels: Int[Tensor, "batch tokens"]) -> None:
        """Adds windows, in which `logits[:, t]` predict `labels[:, t + 1]`; labels of -100 are ignored."""
        for window, target in zip(logits[:, :-1], labels[:, 1:], strict=True):
            loss = nn.functional.cross_entropy(window.float(), target, ignore_index=-100, reduction="sum")
            self.total += in_float64(loss)
            self.count += (target != -100).sum()

    def compute(self) -> Tensor:
        """Returns the perplexity of all windows added so far, as a float64 scalar on `float64_device`."""
        return torch.exp(self.total / self.count.to(self.total.device))


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Int[Tensor, "windows tokens"],
    *,
    batch_size: int = 1,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> float:
    """
    Computes the perplexity of a causal LM over non-overlapping windows, each scored on its own.

    The first token of a window is not predicted, so `windows * (tokens - 1)` tokens count. This is the protocol of the
    GPTQ, SparseGPT and Wanda papers, whose windows are cut from the whole WikiText-2 test text. Always quote the window
    length with the value.

    Args:
        model: a `transformers` causal LM; it runs on its own device, in evaluation mode.
        windows: token ids (windows, tokens).
        batch_size: windows per forward pass.
        progress: show a progress bar.
        ranks: processes that share the windows; each has the model, or its shard of it.

    Raises:
        ValueError: there are no windows, they have fewer than two tokens, or more than the model has positions.
    """
    check_windows(model, windows)
    device = next(model.parameters()).device
    metric = Perplexity(sync_on_compute=False).to(device)
    training = model.training
    model.eval()
    try:
        batches = windows.split(batch_size)
        # Every rank makes the same number of forward passes, because those of sharded models communicate.
        rounds = range(ranks.rank, ranks.rank + len(batches), ranks.size)
        for place in track(rounds, "perplexity", disable=not progress, transient=True):
            ids = batches[min(place, len(batches) - 1)].to(device).long()
            logits = model(input_ids=ids, use_cache=False).logits
            if place < len(batches):
                metric.update(logits, ids)
    finally:
        model.train(training)
    return over_ranks(metric, ranks)


def over_ranks(metric: Perplexity, ranks: Ranks) -> float:
    """Returns the perplexity of what all ranks have added to their metrics; a collective."""
    metric.total, metric.count = ranks.sum(metric.total), ranks.sum(metric.count)
    return float(metric.compute())


def check_windows(model: nn.Module, windows: Tensor) -> None:
    """Raises ValueError as `perplexity` does, before anything runs."""
    if windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(f"perplexity needs windows of two or more tokens, got {tuple(windows.shape)}")
    check_window_length(model, windows.shape[1], "the evaluation windows")
    if isinstance(model, PreTrainedModel):
        check_ids(model, windows, "the evaluation windows")
