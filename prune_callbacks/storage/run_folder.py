"""Reads the folder of a run, finished or not."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from prune_callbacks.sparsity import MaskSet
from prune_callbacks.storage.checkpoints import newest_checkpoint
from prune_callbacks.storage.run_record import STAGES, RunRecord, read_record

TRACES = ("report.json", "config.yaml", "masks.safetensors", "model")
"""Files and folders of which a run's folder has at least one."""


@dataclass(frozen=True)
class Run:
    """
    A run's folder.

    Attributes:
        dirpath: the folder.
        record: the record in `report.json`; an empty record if there is none.
        config: the text of `config.yaml`; None if there is none.
        masks: the masks; None if they cannot be read.
        architecture: kind and size of the model, from `model/config.json`; None if there is none.
        missing: a sentence for every result of a finished run that this run lacks.
        go_on: a sentence on how to get the missing results; None if nothing is missing.
    """

    dirpath: Path
    record: RunRecord
    config: str | None
    masks: MaskSet | None
    architecture: str | None
    missing: tuple[str, ...]
    go_on: str | None


def read_run(dirpath: str | Path) -> Run:
    """
    Reads the folder of a run; parts of an unfinished run may be missing.

    Raises:
        ValueError: there is no such folder, it has none of `TRACES`, it holds a study, or its `report.json` is not the
            record of a run.
    """
    dirpath = Path(dirpath)
    if not dirpath.is_dir():
        found = "is a file" if dirpath.is_file() else "does not exist"
        raise ValueError(f"{dirpath} {found}; name the folder of a run, the output_dir of train.py")
    if not any((dirpath / name).exists() for name in TRACES):
        names = sorted(path.name for path in dirpath.iterdir())
        raise ValueError(
            f"{dirpath} holds no run: found {', '.join(names[:5]) + (', ...' if names[5:] else '') or 'nothing'}. A "
            f"run's folder holds at least one of {', '.join(TRACES)}"
        )
    studied = [path.name for stem in ("sweep", "sensitivity") for path in sorted(dirpath.glob(f"{stem}.*"))]
    if studied and not (dirpath / "report.json").exists():
        raise ValueError(f"{dirpath} holds no run but a study, whose results are in {' and '.join(studied)}")
    written = read_record(dirpath)
    record = RunRecord() if written is None else written
    reached = [stage for stage in STAGES if record.measured(stage)]
    record.stage = record.stage or (reached[-1] if reached else None)
    config_file = dirpath / "config.yaml"
    config = config_file.read_text(encoding="utf-8", errors="replace") if config_file.is_file() else None
    if record.recipe is None and config is not None:
        name = re.search(r"^name: *(\S.*?) *$", config, re.MULTILINE)
        record.recipe = name.group(1) if name else None
    masks, problem = _read_masks(dirpath / "masks.safetensors")
    missing = [*_unmeasured(record, measured=written is not None, job=_is_job(config)), *problem]
    if not (dirpath / "model").is_dir():
        missing.append("The sparse model: there is no folder model/.")
    go_on = _go_on(dirpath, record, config) if missing else None
    return Run(dirpath, record, config, masks, _architecture(dirpath / "model/config.json"), tuple(missing), go_on)


def _read_masks(path: Path) -> tuple[MaskSet | None, list[str]]:
    """Returns the masks, and a sentence if they cannot be read."""
    if not path.is_file():
        return None, ["The masks: there is no masks.safetensors."]
    try:
        return MaskSet.load(path), []
    except ValueError as error:
        return None, [f"The masks: {error}."]


def _architecture(path: Path) -> str | None:
    """Describes the kind and the size of the model; None without a readable `config.json`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, vocabulary = config["model_type"], config["vocab_size"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    blocks = config.get("num_hidden_layers", config.get("n_layer"))
    width = config.get("hidden_size", config.get("n_embd"))
    return f"{kind}, {blocks} blocks of width {width}, {vocabulary} tokens"


def _is_job(config: str | None) -> bool:
    """Returns whether the recipe calls a function in place of a training."""
    return bool(config and re.search(r"^job:\s*$", config, re.MULTILINE))


def _unmeasured(record: RunRecord, *, measured: bool, job: bool) -> list[str]:
    """Returns a sentence for every stage that was not measured."""
    if job and not measured:
        return ["A report: this recipe calls a function in place of a training, whose results are in its own files."]
    if not measured:
        return ["All measurements: report.json is first written when the model is pruned, and there is none yet."]
    if record.stage == "streamed":  # prune_checkpoint neither trains nor measures
        return []
    reached = STAGES.index(record.stage) if record.stage in STAGES else -1
    due = {"pruned": "the masks' last change is still to come", "recovered": "training has not come to its end"}
    quality = "validation metrics" if record.only_metrics() else "perplexity"
    missing = []
    for number, stage in enumerate(STAGES):
        if number > reached:
            missing.append(f"The {stage} model's {quality}: {due.get(stage, 'not measured yet')}.")
        elif not record.measured(stage):
            missing.append(f"The {stage} model's {quality}: not measured, or no finite number.")
    return missing


def _go_on(dirpath: Path, record: RunRecord, config: str | None) -> str:
    """Returns a sentence on how to resume or repeat the run."""
    if record.stage == STAGES[-1]:
        return "The run has come to its end. To get the missing results, repeat the run in another folder."
    if record.command:
        command, overrides = record.command, ""
    elif record.recipe and config is not None:
        command = f"python train.py recipe={shlex.quote(record.recipe)}"
        overrides = ", with the overrides of the first start (config.yaml below has all settings)"
    else:
        return (
            "If the run has stopped, fit again: with ckpt_path= naming a checkpoint of this run if there is one, else "
            "with another folder for RunReport."
        )
    newest = newest_checkpoint(dirpath / "checkpoints")
    if newest is None:
        return f"If the run has stopped, start it again in another folder: {command}{overrides}"
    where = shlex.join([f"output_dir={dirpath}", f"ckpt_path={newest}"])
    return f"If the run has stopped, resume it from its newest checkpoint: {command} {where}{overrides}"
