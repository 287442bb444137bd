"""The walk over the blocks of a checkpoint: each is read, pruned, run and written."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from prune_callbacks.anatomy.names import belongs
from prune_callbacks.anatomy.target import Target
from prune_callbacks.anatomy.targets import parameters_of
from prune_callbacks.calibration.batches import Batch
from prune_callbacks.calibration.chain import needing_a_chain
from prune_callbacks.calibration.collect import collect
from prune_callbacks.calibration.described import described
from prune_callbacks.calibration.prefetch import Ahead, loading_ahead
from prune_callbacks.calibration.sources import Chain
from prune_callbacks.engine.plan import Plan
from prune_callbacks.engine.progress import layer_progress
from prune_callbacks.engine.solving import BlockPruning
from prune_callbacks.memory import peak_memory, reset_peak_memory
from prune_callbacks.ranks import Ranks
from prune_callbacks.reconstruction.blocks import Rebuilder, Show
from prune_callbacks.reconstruction.windows import by_content
from prune_callbacks.recorded_warnings import RecordedWarnings
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.streaming.block_weights import BlockWeights
from prune_callbacks.streaming.files import sizes, whole, write_tensors
from prune_callbacks.streaming.front import Front
from prune_callbacks.streaming.inputs import StoredInputs, store_inputs, store_next
from prune_callbacks.streaming.journal import Journal
from prune_callbacks.streaming.places import find_places
from prune_callbacks.streaming.shards import Shards, masks_in_pieces
from prune_callbacks.streaming.skeleton import refuse_shared
from prune_callbacks.streaming.source import CheckpointFolder

Advance = Callable[[int], None]


class BlockWalk:
    """
    A walk over the blocks of a checkpoint that keeps the weights of one block at a time in memory.

    Args:
        checkpoint: the checkpoint to read.
        model: its model on the meta device; see `build_skeleton`.
        plan: the targets, the pruner and the device.
        batches: calibration batches of all ranks; empty for a pruner that needs no calibration.
        min_expert_tokens: an expert that fewer tokens reach is pruned by Magnitude.
        ranks: the R processes that share the target. Each runs every R-th batch, and rank 0 writes the common files.

    Attributes:
        shards: the distribution of the weights over files.

    Raises:
        ValueError: the batches or the checkpoint do not fit the model, or blocks share weights.
    """

    def __init__(
        self,
        checkpoint: CheckpointFolder,
        model: PreTrainedModel,
        plan: Plan,
        batches: Sequence[Batch],
        min_expert_tokens: int,
        ranks: Ranks,
    ) -> None:
        assert plan.device is not None
        self.checkpoint, self.model, self.plan, self.where = checkpoint, model, plan, plan.device
        self.batches = batches[ranks.rank :: ranks.size]
        self.min_expert_tokens, self.ranks = min_expert_tokens, ranks
        self.blocks = plan.blocks
        refuse_shared(model, self.blocks)
        self.shards = Shards(model, [name for name, _ in self.blocks], find_places(model, checkpoint))
        self.weights = BlockWeights(checkpoint, model, self.blocks, self.shards.of_block, self.where, plan.last)
        self.few_tokens = False
        self._dense: list[StoredInputs] = []  # the inputs of the block in the dense model
        settings = plan.reconstruction
        self.rebuilder = None
        if settings is not None:
            hashes = [described(batch) for batch in batches]
            order = by_content([hashes[rank :: ranks.size] for rank in range(ranks.size)])
            self.rebuilder = Rebuilder(model, settings, order, ranks, frozen=False)

    def run(self, journal: Journal, progress: bool, heard: RecordedWarnings) -> None:
        """Prunes all unfinished blocks; every record includes all warnings so far."""
        begin = len(journal.records)
        if begin:
            last = journal.records[-1]
            heard.put_before(last["warnings"])
            self.few_tokens = last["few_tokens"]
        reset_peak_memory(self.where)
        with layer_progress(len(self.plan.targets), progress and self.ranks.rank == 0) as (bar, task):
            bar.update(task, completed=sum(len(self.plan.in_block(index)) for index in range(begin)))
            inputs: list[StoredInputs] = []
            if self.plan.runs and begin <= self.plan.last:
                bar.update(task, description="embedding the calibration windows")
                inputs = self._inputs(journal, begin)
            self._dense = [piece.beside_in(journal.dense(begin) if begin else None) for piece in inputs]
            with loading_ahead(self.where) as ahead:
                for index in range(begin, len(self.blocks)):
                    bar.update(task, description=f"pruning {self.blocks[index][0]}")
                    started = time.perf_counter()
                    record = self._block(
                        journal,
                        index,
                        inputs,
                        ahead,
                        lambda count: bar.advance(task, count),
                        lambda text: bar.update(task, description=text),
                    )
                    seconds = time.perf_counter() - started
                    journal.commit(record | {"seconds": seconds} | self._of_all(heard))
        if self.rebuilder is not None:
            self.rebuilder.reports = journal.reconstructed()  # in killed calls too
            self.rebuilder.finish()

    def _of_all(self, heard: RecordedWarnings) -> dict[str, Any]:
        """Returns what the record of a block says of all ranks: the largest peak of memory so far, and the warnings."""
        parts = self.ranks.gather((peak_memory(self.where), list(heard.texts), self.few_tokens))
        peaks, texts, few = zip(*parts, strict=True)
        self.few_tokens = any(few)
        warned = list(dict.fromkeys(chain.from_iterable(texts)))
        return {"peak_memory_bytes": max(peaks), "warnings": warned, "few_tokens": self.few_tokens}

    def _inputs(self, journal: Journal, index: int) -> list[StoredInputs]:
        """Returns the inputs of a block: the first one, or one whose hidden states an earlier call has written."""
        journal.check_hidden(index, dense=self.rebuilder is not None)
        front = Front(self.checkpoint, self.model, self.shards.outside, self.batches, self.ranks)
        self.ranks.attempt(lambda: self.weights.load(0))
        inputs = front.run(lambda: self._stored([block for _, block in self.blocks], journal, index))
        self.weights.unload(0)
        return inputs

    def _stored(self, blocks: Sequence[nn.Module], journal: Journal, index: int) -> list[StoredInputs]:
        """Captures and stores the inputs of the blocks; removes a target that was only begun if that fails."""
        try:
            with needing_a_chain("prune_checkpoint", self.model):
                return store_inputs(self.model, blocks, self.batches, journal.hidden(index), self.ranks)
        except ValueError:
            if index == 0:
                journal.discard()
            raise

    def _block(
        self,
        journal: Journal,
        index: int,
        inputs: Sequence[StoredInputs],
        ahead: Ahead | None,
        advance: Advance,
        show: Show,
    ) -> dict[str, Any]:
        """Prunes a block, runs it to get the inputs of the next one, and writes its weights; returns its record."""
        targets, names = self.plan.in_block(index), self.shards.of_block[index]
        shard = journal.model / self.shards.file(index)
        runs = self.plan.runs and index < self.plan.last
        nothing: tuple[str, ...] = ("skipped", "by_magnitude", "violations", "parameters")
        record: dict[str, Any] = {"layers": []} | {key: {} for key in nothing}
        prefix, block = self.blocks[index]
        used = bool(targets or runs)  # else rank 0 copies its weights, and the others have nothing to do
        self.ranks.attempt(lambda: self.weights.load(index, ahead, move=used) if used or self.ranks.rank == 0 else None)
        if self.rebuilder is not None and (targets or runs):
            store_next(index, block, self._dense, self.where, journal.dense(index + 1), self.ranks)
        if targets:
            record = self._prune(journal, index, targets, inputs, advance, show)
        if runs:
            store_next(index, block, inputs, self.where, journal.hidden(index + 1), self.ranks)
        state = block.state_dict()
        self.ranks.first(
            lambda: self.shards.write_block({name: state[name.removeprefix(f"{prefix}.")] for name in names}, shard)
        )
        state = {}
        self.weights.unload(index)
        return record | {"files": sizes(shard, journal.masks(index), journal.scales(index))}

    def _prune(
        self,
        journal: Journal,
        index: int,
        targets: dict[str, Target],
        inputs: Sequence[StoredInputs],
        advance: Advance,
        show: Show,
    ) -> dict[str, Any]:
        run = BlockPruning(replace(self.plan, skipped={}), self.ranks, self.min_expert_tokens)
        run.few_tokens = self.few_tokens
        name, block = self.blocks[index]
        make, calibrated = self.plan.pruner.statistic, self.plan.calibrated
        statistics = collect(make, index, block, targets, inputs, self.where, self.ranks) if calibrated else {}
        if calibrated and not Chain(inputs, self.ranks).calls(index):
            run.leave_dense(name, targets, advance)
        else:
            run.prune(targets, statistics, advance)
        self.few_tokens = run.few_tokens
        del statistics
        masks = MaskSet.join(run.masks)
        if self.rebuilder is not None:
            self.rebuilder.reconstruct(index, name, block, inputs, self._dense, masks, self.where, show)
        tensors, shapes = masks_in_pieces(masks)
        self.ranks.first(lambda: write_tensors(journal.masks(index), tensors, shapes))
        if run.scales:
            scales = {name: whole(scale) for name, scale in run.scales.items()}
            self.ranks.first(lambda: write_tensors(journal.scales(index), scales))
        weights = parameters_of(targets.values())
        return {
            "layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in run.layers],
            "skipped": run.skipped,
            "by_magnitude": run.by_magnitude,
            "parameters": {name: [int((~masks[name]).count_nonzero()), math.prod(masks.shape(name))] for name in masks},
            "violations": masks.violations({name: weights[name] for name in masks}),
        } | self._reconstructed(name)

    def _reconstructed(self, name: str) -> dict[str, Any]:
        """Returns the record of a block's reconstruction; {} without one."""
        if self.rebuilder is None:
            return {}
        reports = [report.to_dict() for report in self.rebuilder.reports if report.name == name]
        untrained = {path: why for path, why in self.rebuilder.left.items() if belongs(path, name)}
        return {"reconstruction": reports, "untrained": untrained}
