"""consolidate: turns a checkpoint of any built-in strategy into a plain model folder that every tool reads."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from prune_callbacks.anatomy.names import names_by_tensor
from prune_callbacks.parallel.packed import count_removed
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.storage.checkpoint_masks import checkpoint_masks, from_zeros, held_masks
from prune_callbacks.storage.checkpoints import TrainingCheckpoint, newest_checkpoint, open_checkpoint
from prune_callbacks.storage.model_card import write_model_card
from prune_callbacks.storage.model_folder import empty_model, unread
from prune_callbacks.storage.run_record import RunRecord, Zeros
from prune_callbacks.writing import replaced_folder, write_json

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf", "*.pt")


def consolidate(
    checkpoint: str | Path,
    template: str | Path,
    dirpath: str | Path,
    *,
    prefix: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    progress: bool = True,
) -> dict[str, Any]:
    """
    Consolidates a checkpoint: writes `dirpath/model`, `dirpath/masks.safetensors` and `dirpath/report.json`.

    `dirpath/model` is equivalent to `save_pretrained` of the trained model. The weights are the fp32 masters if the
    checkpoint has them, converted to `dtype`. Weights are read and written one file of at most `max_shard_size` at a
    time, so no more memory is needed. Zeros and violations are counted in the written weights. A checkpoint of weights
    alone (`save_weights_only=True`), or of callbacks without masks, has none: they are the zeros of the matrices in
    its decoder blocks, as a warning and the report say.

    Args:
        checkpoint: a checkpoint of one device, DDP, FSDP2 or DeepSpeed ZeRO, or a folder of checkpoints, of which the
            newest complete one is read.
        template: a folder with the model's configuration (and tokenizer), e.g. `model/` of the trained run, or the
            folder of the model before training. The configuration's `architectures` names the model's class.
        dirpath: the folder to write into. An existing `model/` is replaced once the new one is complete.
        prefix: the prefix of the model's names in the checkpoint, e.g. "student."; None: the only prefix that fits.
        dtype: the dtype of the written weights, e.g. "bfloat16"; None: the configuration's, else float32.
        max_shard_size: the maximum size of a file of weights.
        progress: show a progress bar.

    Returns:
        the content of `report.json`: the run's report at the time of the checkpoint, with sparsity and violations of
        the written weights. Their perplexity is not measured.

    Raises:
        ValueError: there is no checkpoint, no configuration or no masks, `dtype` is unknown, or the weights are not, or
            not all, weights of that model.
    """
    if not (Path(template) / "config.json").is_file():
        raise ValueError(
            f"there is no config.json in {template}; name a folder with the model's configuration (template=), such as "
            "model/ of the run that was trained, or the folder of the model before training"
        )
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype is one of torch's, such as 'bfloat16', got {dtype!r}")
    path = newest_checkpoint(checkpoint) or checkpoint
    source = open_checkpoint(path)
    config = AutoConfig.from_pretrained(template, trust_remote_code=False)
    skeleton = empty_model(config)
    config.dtype = getattr(torch, dtype) if dtype is not None else config.dtype or torch.float32
    config.architectures = config.architectures or [type(skeleton).__name__]
    places = _places(skeleton, source, prefix)
    masks = checkpoint_masks(source, places, skeleton)
    with replaced_folder(Path(dirpath) / "model") as partial:
        shutil.copytree(template, partial, ignore=shutil.ignore_patterns(*WEIGHTS), dirs_exist_ok=True)
        config.save_pretrained(partial)
        counted = _write(source, places, skeleton, config.dtype, masks, partial, max_shard_size, progress)
        note = f"Consolidated from a checkpoint of optimizer step {source.step}."
        write_model_card(partial, masks.sparsity(), len(masks), note=note)
    masks.save(Path(dirpath) / "masks.safetensors")
    report = replace(_report(source, counted), stage="consolidated", checkpoint=str(path)).to_json()
    write_json(Path(dirpath) / "report.json", report)
    if progress:
        print(
            f"{path}, of optimizer step {source.step}, is now the model in {Path(dirpath) / 'model'}: "
            f"{report['sparsity']['achieved']:.2%} zeros in {len(counted)} masked layers, "
            f"{sum(report['violations'].values())} violations"
        )
    return report


def _places(skeleton: PreTrainedModel, source: TrainingCheckpoint, prefix: str | None) -> dict[str, str]:
    """Returns the checkpoint's name of every weight; of tied weights only the first, as transformers saves it."""
    known, groups = set(source.names()), list(names_by_tensor(skeleton).values())
    first = groups[0][0]
    possible = {name.removesuffix(first) for name in known if name == first or name.endswith(f".{first}")}
    candidates = sorted(possible) if prefix is None else [prefix]
    fitting = [p for p in candidates if all(any(p + name in known for name in names) for names in groups)]
    if len(fitting) > 1:
        raise ValueError(f"the checkpoint holds several such models, under {fitting}; choose one with prefix=")
    if not fitting:
        begin = (candidates or [""])[0]
        missing = [names[0] for names in groups if not any(begin + name in known for name in names)]
        raise ValueError(
            f"the checkpoint is of another model than the configuration: of {len(groups)} weights {len(missing)} are "
            f"missing under {begin!r}, first {missing[0]}; it has {len(known)}, first {min(known, default='none')}"
        )
    _refuse_unknown(skeleton, known, fitting[0])
    return {names[0]: next(fitting[0] + name for name in names if fitting[0] + name in known) for names in groups}


def _refuse_unknown(skeleton: PreTrainedModel, known: set[str], prefix: str) -> None:
    """Raises ValueError if the checkpoint's model has weights that its configuration has no place for."""
    # Without a prefix, a module's other members are not told apart from those of the model.
    own = sorted(name.removeprefix(prefix) for name in known if prefix and name.startswith(prefix))
    unknown = unread(skeleton, own)
    if unknown:
        raise ValueError(
            f"the checkpoint is of another model than the configuration: {len(unknown)} of its weights under "
            f"{prefix!r}, first {unknown[0]}, are no weights of {type(skeleton).__name__}; name a template whose "
            "config.json has the model's class in `architectures`"
        )


def _write(
    source: TrainingCheckpoint,
    places: dict[str, str],
    skeleton: nn.Module,
    dtype: torch.dtype,
    masks: MaskSet,
    folder: Path,
    max_shard_size: str,
    progress: bool,
) -> dict[str, tuple[int, int, int]]:
    """Writes the weights; returns (zeros, violations, size) of every masked weight."""
    empty = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in skeleton.state_dict().items()
        if name in places
    }
    plan = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    counted: dict[str, tuple[int, int, int]] = {}
    with Progress(disable=not progress) as bar:
        task = bar.add_task("writing the model", total=len(places))
        for file, names in plan.filename_to_tensors.items():
            weights: dict[str, Tensor] = {}
            for name in names:
                weight = source.read(places[name]).to(empty[name].dtype).contiguous()
                if name in masks:
                    removed = count_removed(weight, masks[name].flatten())
                    counted[name] = (int((weight == 0).count_nonzero()), removed, weight.numel())
                weights[name] = weight
                bar.advance(task)
            save_file(weights, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return counted


def _report(source: TrainingCheckpoint, counted: dict[str, tuple[int, int, int]]) -> RunRecord:
    """Makes the record from the state of RunReport in the checkpoint and the new counts."""
    record = RunRecord.from_json(source.callbacks.get("RunReport", {}).get("record", {}))
    zeros, total = sum(zeros for zeros, _, _ in counted.values()), sum(size for _, _, size in counted.values())
    record.violations = {name: removed for name, (_, removed, _) in counted.items() if removed}
    if record.violations:
        warnings.warn(
            f"{sum(record.violations.values())} pruned weights are not zero in the checkpoint, first in "
            f"{next(iter(record.violations))}: the masks were not held",
            stacklevel=3,
        )
    layers = {name: zeros / size for name, (zeros, _, size) in counted.items()}
    record.sparsity = Zeros(record.sparsity.target, zeros / max(1, total), layers)
    record.optimizer_steps = source.step
    if not held_masks(source):
        record.warnings = [*(record.warnings or ()), from_zeros(source)]
    return record
