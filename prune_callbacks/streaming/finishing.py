"""Checks for disk space before the walk; writes the remaining files of the target after all blocks."""

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prune_callbacks.calibration.batches import Batch
from prune_callbacks.reconstruction.report import reconstruction_record
from prune_callbacks.storage.model_card import write_model_card
from prune_callbacks.storage.model_folder import MASKS
from prune_callbacks.storage.model_parts import INDEX, index_of
from prune_callbacks.storage.run_record import RunRecord, Seconds, Zeros
from prune_callbacks.streaming.files import copy_file, size_of, sizes, write_json
from prune_callbacks.streaming.journal import MODEL, SCALES, Journal
from prune_callbacks.streaming.shards import Shards, join_files
from prune_callbacks.streaming.walk import BlockWalk
from prune_callbacks.writing import rename

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json")
"""Suffixes of weight files."""


def check_space(
    journal: Journal, shards: Shards, batches: Sequence[Batch], model: PreTrainedModel, streams: int
) -> None:
    """
    Raises ValueError if the disk has no room for the model, its masks, and two sets of hidden states of each stream.

    Bytes that an earlier, unfinished call has written count as available.
    """
    width = getattr(model.config.get_text_config(decoder=True), "hidden_size", 0)
    tokens = 0
    for batch in batches:
        ids = batch["input_ids"] if isinstance(batch, Mapping) and "input_ids" in batch else batch
        tokens += ids.numel() if isinstance(ids, Tensor) else 0
    needed = shards.nbytes + shards.nbytes // (8 * model.dtype.itemsize) * 2
    needed += 2 * streams * tokens * width * model.dtype.itemsize
    needed -= sum(size_of(folder) for folder in (journal.work, journal.model, journal.target / MODEL))
    free = shutil.disk_usage(journal.target).free
    if needed > free:
        raise ValueError(
            f"the disk of {journal.target} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed: "
            f"{shards.nbytes / 1e9:.2f} GB for the model, and room for its masks and the windows' hidden states. Make "
            "room, or choose a target on another disk"
        )


def finish(journal: Journal, walk: BlockWalk, about: Mapping[str, Any]) -> dict[str, Any]:
    """
    Writes the weights outside of the blocks, the other files of the model, all masks and scales, and the report.

    The report is written last and marks the pruning as finished; returns it. It has the entries of `about`.
    """
    shards, checkpoint = walk.shards, walk.checkpoint
    if journal.model.exists():  # otherwise an earlier call has renamed it already
        shards.copy_outside(checkpoint, journal.model / shards.file(len(shards.of_block)))
        write_json(journal.model / INDEX, index_of(journal.model, shards.files()))
        _copy_others(checkpoint.folder, journal.model)
        config = checkpoint.config
        config.dtype = walk.model.dtype
        config.architectures = config.architectures or [type(walk.model).__name__]
        write_json(journal.model / "config.json", json.loads(config.to_json_string()))
        counts = [counts for record in journal.records for counts in record["parameters"].values()]
        removed, weights = (sum(count[i] for count in counts) for i in (0, 1))
        write_model_card(journal.model, removed / max(1, weights), len(counts), durable=True)
        rename(journal.model, journal.target / MODEL, durable=True)
    numbers = range(len(journal.records))
    join_files([p for p in map(journal.masks, numbers) if p.exists()], journal.target / MASKS)
    scales = [p for p in map(journal.scales, numbers) if p.exists()]
    if scales:
        join_files(scales, journal.target / SCALES)
    return journal.finish(replace(_report(journal, walk), **about))


def _copy_others(source: Path, target: Path) -> None:
    """Copies all files that are not weights: tokenizer, generation settings, licence."""
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        # The only folder to copy holds further chat templates; others hold weights in other formats, or caches.
        wanted = len(inner.parts) == 1 or inner.parts[0] == "additional_chat_templates"
        if path.is_file() and wanted and not path.name.endswith(WEIGHTS) and not path.name.startswith("."):
            (target / inner).parent.mkdir(exist_ok=True)
            copy_file(path, target / inner)


def _report(journal: Journal, walk: BlockWalk) -> RunRecord:
    """Returns the record of the run, without any perplexity: none is measured while streaming."""
    layers = [layer for record in journal.records for layer in record["layers"]]
    parameters = {name: counts for record in journal.records for name, counts in record["parameters"].items()}
    removed, weights = (sum(counts[i] for counts in parameters.values()) for i in (0, 1))
    skipped = dict(walk.plan.skipped)
    for record in journal.records:
        skipped |= record["skipped"]
    return RunRecord(
        stage="streamed",
        optimizer_steps=0,
        processes=walk.ranks.size,
        device=torch.cuda.get_device_name(walk.where) if walk.where.type == "cuda" else platform.machine(),
        pruner=", then ".join(repr(s) for s in (walk.plan.pruner, walk.plan.reconstruction) if s is not None),
        sparsity=Zeros(
            walk.plan.pruner.pattern.sparsity,
            removed / max(1, weights),
            {name: gone / size for name, (gone, size) in parameters.items()},
        ),
        violations={name: count for record in journal.records for name, count in record["violations"].items()},
        reconstruction_loss={layer["name"]: layer["relative_loss"] for layer in layers},
        layers=layers,
        skipped=skipped,
        reconstruction=_reconstruction(journal, walk),
        by_magnitude={name: n for record in journal.records for name, n in record["by_magnitude"].items()},
        seconds=Seconds(sum(record["seconds"] for record in journal.records), 0.0, 0.0),
        files=sizes(
            *sorted((journal.target / MODEL).glob("*.safetensors*")),
            *(journal.target / MODEL / "config.json", journal.target / MASKS, journal.target / SCALES),
        ),
        peak_memory_bytes=max((record["peak_memory_bytes"] for record in journal.records), default=0),
        versions={name: version(name) for name in ("prune-callbacks", "torch", "transformers", "safetensors")},
    )


def _reconstruction(journal: Journal, walk: BlockWalk) -> dict[str, Any]:
    if walk.plan.reconstruction is None:
        return {}
    untrained = {name: why for record in journal.records for name, why in record.get("untrained", {}).items()}
    return reconstruction_record(walk.plan.reconstruction, journal.reconstructed(), untrained)
