"""Measures the perplexity of a checkpoint that is read one decoder block at a time."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prune_callbacks.anatomy.ends import output_layer
from prune_callbacks.anatomy.stages import block_stages
from prune_callbacks.calibration.capture import forwards_replaced
from prune_callbacks.calibration.chain import needing_a_chain
from prune_callbacks.calibration.stand_ins import StandIns
from prune_callbacks.engine.plan import parsed_device
from prune_callbacks.engine.progress import layer_progress
from prune_callbacks.measure.perplexity import Perplexity, check_windows, over_ranks
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.streaming.block_weights import BlockWeights
from prune_callbacks.streaming.files import remove_folder
from prune_callbacks.streaming.front import Front, filled, names_outside
from prune_callbacks.streaming.inputs import StoredInputs, store_inputs, store_next
from prune_callbacks.streaming.places import find_places
from prune_callbacks.streaming.shards import Shards
from prune_callbacks.streaming.skeleton import build_skeleton, model_dtype, refuse_shared
from prune_callbacks.streaming.source import CheckpointFolder
from prune_callbacks.writing import PARTIAL


@torch.no_grad()
def checkpoint_perplexity(
    source: str | Path,
    windows: Int[Tensor, "windows tokens"],
    folder: str | Path,
    *,
    batch_size: int = 1,
    dtype: torch.dtype | str | None = None,
    blocks: str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> float:
    """
    Computes the perplexity of a checkpoint in the memory of one decoder block and of the weights outside of them.

    Equivalent to `from_pretrained` and `perplexity`, to rounding.

    Args:
        source: a Hugging Face folder with safetensors files.
        windows: token ids (windows, tokens).
        folder: a folder, in which `hidden.partial` holds the windows' hidden states meanwhile; nothing else in it is
            touched.
        batch_size: windows per forward pass.
        dtype: dtype of the weights; None: that of the configuration.
        blocks: name of the list of decoder blocks, where it cannot be found.
        device: the device on which blocks and the output layer are run; None: the CPU.
        progress: show a progress bar.
        ranks: processes that share the windows and the folder.

    Raises:
        ValueError: the source cannot be read in parts, its blocks do not form a chain, or the windows do not fit the
            model.
    """
    walk = ranks.attempt(lambda: _Walk(Path(source), windows, batch_size, dtype, blocks, device, ranks))
    ranks.attempt(lambda: _check_folder(Path(source), Path(folder)))
    work = Path(folder) / f"hidden{PARTIAL}"
    ranks.first(lambda: _make_empty(work))
    try:
        return walk.run(work, progress)
    finally:
        if ranks.rank == 0:
            remove_folder(work)


def _check_folder(source: Path, folder: Path) -> None:
    if folder.resolve() == source.resolve():
        raise ValueError(f"folder {folder} is the source, which is never changed; choose another folder")


def _make_empty(folder: Path) -> None:
    remove_folder(folder)
    folder.mkdir(parents=True)


class _Walk:
    """A walk of evaluation windows through the blocks of a checkpoint."""

    def __init__(
        self,
        source: Path,
        windows: Tensor,
        batch_size: int,
        dtype: torch.dtype | str | None,
        blocks: str | None,
        device: torch.device | str | None,
        ranks: Ranks,
    ) -> None:
        checkpoint = CheckpointFolder(source)
        self.model = build_skeleton(checkpoint.config, model_dtype(checkpoint, dtype))
        check_windows(self.model, windows)
        self.blocks = block_stages(self.model, blocks).parts
        self.parts = [block for _, block in self.blocks]
        refuse_shared(self.model, self.blocks)
        shards = Shards(self.model, [name for name, _ in self.blocks], find_places(self.model, checkpoint))
        self.checkpoint, self.outside, self.ranks = checkpoint, shards.outside, ranks
        self.names = names_outside(self.model, shards.outside)
        self.where = parsed_device(device or "cpu")
        last = len(self.blocks) - 1
        self.weights = BlockWeights(checkpoint, self.model, self.blocks, shards.of_block, self.where, last)
        self.batches = windows.long().split(batch_size)[ranks.rank :: ranks.size]

    def run(self, work: Path, progress: bool) -> float:
        """Returns the perplexity; hidden states go through files in a folder."""
        with layer_progress(len(self.blocks), progress and self.ranks.rank == 0) as (bar, task):
            bar.update(task, description="perplexity of the checkpoint, block by block")
            inputs = self._inputs(work / "hidden_0")
            for index in range(len(self.blocks)):
                self._block(index, inputs, work)
                bar.advance(task)
        return over_ranks(self.ranks.attempt(lambda: self._score(inputs)), self.ranks)

    def _inputs(self, folder: Path) -> list[StoredInputs]:
        """Returns the inputs of the first block."""
        front = Front(self.checkpoint, self.model, self.outside, self.batches, self.ranks)
        self.ranks.attempt(lambda: self.weights.load(0))
        with needing_a_chain("checkpoint_perplexity", self.model):
            inputs = front.run(lambda: store_inputs(self.model, self.parts, self.batches, folder, self.ranks))
        self.weights.unload(0)
        return inputs

    def _block(self, index: int, inputs: Sequence[StoredInputs], work: Path) -> None:
        """Runs a block, whose outputs become the inputs."""
        self.ranks.attempt(lambda: self.weights.load(index, move=True))
        store_next(index, self.parts[index], inputs, self.where, work / f"hidden_{index + 1}", self.ranks)
        self.weights.unload(index)
        self.ranks.first(lambda: remove_folder(work / f"hidden_{index}"))

    def _score(self, inputs: Sequence[StoredInputs]) -> Perplexity:
        """Runs what comes after the blocks on what the last one has returned."""
        metric = Perplexity(sync_on_compute=False).to(self.where)
        if not self.batches:
            return metric
        stand_ins = StandIns(self.parts)
        self.weights.load(0)  # its output shows the stand-ins what a block returns
        forwards = [stand_ins.of(index) for index in range(len(self.parts))]
        with (
            filled(self.model, self.checkpoint, self.names),
            self._logits() as logits,
            forwards_replaced(self.parts, forwards),
        ):
            for ids, left in zip(self.batches, inputs, strict=True):
                stand_ins.capture(self.model, ids, _ending_in(left))
                metric.update(logits.pop().to(self.where), ids.to(self.where))
        self.weights.unload(0)
        return metric

    @contextmanager
    def _logits(self) -> Iterator[list[Tensor]]:
        """Runs the output layer on the device, and collects what the model returns as logits."""
        found: list[Tensor] = []
        hook = self.model.register_forward_hook(lambda model, args, output: found.append(output.logits))
        head = output_layer(self.model)
        heads = [] if head is None else [head]
        copies = [copy.deepcopy(head).to(self.where) for head in heads]  # its weight may be the embeddings' too
        try:
            with forwards_replaced(heads, [partial(_run_on, self.where, head) for head in copies]):
                yield found
        finally:
            hook.remove()


def _run_on(device: torch.device, module: nn.Module, hidden: Tensor) -> Any:
    return module(hidden.to(device))


def _ending_in(inputs: StoredInputs) -> Callable[[Tensor], Tensor]:
    """Returns a change of hidden states for stand-ins: the last block that is called returns those of `inputs`."""
    called, now = sum(call is not None for call in inputs.calls), count(1)
    return lambda hidden: inputs.hidden if next(now) == called else hidden
