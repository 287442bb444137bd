"""The record of a run: the content of `report.json`."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

STAGES = ("dense", "pruned", "recovered")

SCHEMA = 1
"""The version of `report.json`; it rises when a key changes its meaning or is removed."""


@dataclass
class Perplexities:
    """
    The perplexity of the three models on one text; None: not measured, or no finite number.

    Attributes:
        dataset: the text's title.
        seq_len: tokens per window; perplexities at different lengths cannot be compared.
        dense: the perplexity before pruning.
        pruned: the perplexity after pruning.
        recovered: the perplexity after training under the masks.
    """

    dataset: str | None = None
    seq_len: int | None = None
    dense: float | None = None
    pruned: float | None = None
    recovered: float | None = None

    def at(self, stage: str) -> float | None:
        """Returns the value of one of `STAGES`."""
        value: float | None = getattr(self, stage)
        return value


@dataclass
class Seconds:
    """The wall time of a run's parts, in seconds; None: not known."""

    prune: float | None = None
    recover: float | None = None
    evaluate: float | None = None


@dataclass
class Zeros:
    """
    Fractions of zeros, counted in the weights.

    Attributes:
        target: the sparsity that was asked for.
        achieved: the fraction in all pruned layers together.
        layers: the fraction in every pruned layer, by parameter name.
    """

    target: float | None = None
    achieved: float | None = None
    layers: dict[str, float] = field(default_factory=dict)


@dataclass
class RunRecord:
    """
    The record of a run. `to_json` returns the content of `report.json`.

    Attributes:
        schema: the version of the keys, `SCHEMA`.
        recipe: the name of the recipe.
        model: the name of the model.
        stage: the last measured stage, one of `STAGES`; or "streamed" or "consolidated".
        command: the shell line that repeats the run.
        perplexity: the perplexities on the evaluation windows.
        corpora: the perplexities on further texts, by name: dataset, seq_len, windows, and a value per stage.
        zero_shot: the accuracies, by task: metric, limit, examples, data, and a value per stage.
        metrics: what the module logs in its own validation, by name: a value per stage; {} if that was not measured.
        rounds: step, sparsity, perplexity and, if measured, metrics (name to value) before every change of
            `IterativePrune` and at the end.
        changes: the optimizer steps at which masks changed.
        training_loss: (optimizer step, loss).
        seconds: the wall time of the parts.
        tokens: how many tokens a part has seen, by its name: "prune" (calibration) and "recover" (training).
        permuting: of channels that were permuted before pruning: the seconds; {} without it.
        writing: of calibration windows that the dense model wrote itself: their number and the seconds; {} without any.
        allocating: of the dense model's measuring for an allocation: the seconds, also in `prune`; {} without one.
        peak_memory_bytes: the largest peak of the process or device.
        pruner: the `repr` of the pruners.
        allocation: the `repr` of the allocation; None: the same sparsity in every layer.
        schedule: the `repr` of the schedule; None: pruned at once.
        optimizer_steps: the number of finished optimizer steps.
        strategy: the class name of Lightning's strategy.
        processes: the number of processes.
        precision: the trainer's precision.
        adapter: the folder of an adapter alongside the model; None: there is none.
        sparsity: fractions of zeros.
        violations: how many pruned weights are not zero, by parameter name; {} if there are none.
        reconstruction_loss: the relative loss of every layer's output when it was pruned, by layer.
        reconstruction: of block reconstruction: its settings, seconds, the names of blocks that were put back, every
            block's loss before and after, and why parameters were not trained; {} without it.
        skipped: the reason for every layer that stayed dense, by layer.
        by_magnitude: the number of tokens of every expert that too few tokens reached.
        warnings: the texts of warnings.
        versions: the versions of packages and Python.
        device: the name of the device.
        layers: of a streamed pruning, every layer's `LayerReport`.
        files: the bytes of the files that were streamed.
        setting: the settings of a streamed pruning.
        checkpoint: the checkpoint that was consolidated.
        text: how text became windows; of `TokenDataModule`: `bos`, whether every window begins with BOS, and
            `calibration_rows`, "joined" or "separate".
    """

    schema: int = SCHEMA
    recipe: str | None = None
    model: str | None = None
    stage: str | None = None
    command: str | None = None
    perplexity: Perplexities = field(default_factory=Perplexities)
    corpora: dict[str, dict[str, Any]] = field(default_factory=dict)
    zero_shot: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    changes: list[int] = field(default_factory=list)
    training_loss: list[list[Any]] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    tokens: dict[str, int] = field(default_factory=dict)
    permuting: dict[str, float] = field(default_factory=dict)
    writing: dict[str, float] = field(default_factory=dict)
    allocating: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    pruner: str | None = None
    allocation: str | None = None
    schedule: str | None = None
    optimizer_steps: int | None = None
    strategy: str | None = None
    processes: int | None = None
    precision: str | None = None
    adapter: str | None = None
    sparsity: Zeros = field(default_factory=Zeros)
    violations: dict[str, int] | None = None
    reconstruction_loss: dict[str, float | None] = field(default_factory=dict)
    reconstruction: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    by_magnitude: dict[str, int] = field(default_factory=dict)
    warnings: list[str] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, int] | None = None
    setting: dict[str, Any] | None = None
    checkpoint: str | None = None
    text: dict[str, Any] = field(default_factory=dict)

    def measured(self, stage: str) -> bool:
        """Returns whether the quality at one of `STAGES` is known: a perplexity, or a metric."""
        known = (self.perplexity.at(stage), *(values.get(stage) for values in self.metrics.values()))
        return any(value is not None for value in known)

    def only_metrics(self) -> bool:
        """Returns whether quality was measured by metrics and not by perplexity."""
        return bool(self.metrics) and not any(self.perplexity.at(stage) is not None for stage in STAGES)

    def add_batch(self, tokens: int) -> None:
        """Counts the tokens of a training batch."""
        self.tokens["recover"] = self.tokens.get("recover", 0) + tokens

    def add_loss(self, step: int, loss: float) -> None:
        """Adds a point to the training loss, unless the last one is of the same step."""
        if not self.training_loss or self.training_loss[-1][0] != step:
            self.training_loss.append([step, round(loss, 5) if math.isfinite(loss) else None])

    def to_json(self) -> dict[str, Any]:
        """Returns the record as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "RunRecord":
        """
        Makes a record from the result of `to_json`; missing keys get defaults, and unknown keys are ignored.

        Raises:
            ValueError: `record` is no record of a run, or of a later version.
        """
        parts = {"perplexity": Perplexities, "seconds": Seconds, "sparsity": Zeros}
        if not isinstance(record, Mapping):
            raise ValueError("this is not the record of a run")
        for name in (*parts, "metrics"):
            if not isinstance(record.get(name) or {}, Mapping):
                raise ValueError(f"this is not the record of a run: its {name} is {record[name]!r}")
        if not isinstance(record.get("schema") or SCHEMA, int):
            raise ValueError(f"the record has schema {record['schema']!r}, which is no whole number")
        if (record.get("schema") or SCHEMA) > SCHEMA:
            raise ValueError(
                f"the record has schema {record['schema']}, and this version of prune-callbacks reads up to {SCHEMA}; "
                "install a later one"
            )
        given = _known(cls, record)
        return cls(**(given | {name: kind(**_known(kind, given.get(name, {}))) for name, kind in parts.items()}))


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that are not None and have the name of a field of a dataclass."""
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in values.items() if value is not None and name in names}


def resumed_record(record: Mapping[str, Any], recipe: str | None) -> RunRecord:
    """Makes a record from that in a checkpoint; ValueError if another recipe wrote it."""
    written = record["recipe"]
    if written != recipe:
        raise ValueError(
            f"the checkpoint was written by recipe {written}, and this is {recipe}; resume with the same recipe"
        )
    return RunRecord.from_json(record)


def refuse_existing_run(dirpath: Path) -> None:
    """Raises ValueError if the folder already holds a run."""
    found = [name for name in ("report.json", "masks.safetensors", "model") if (dirpath / name).exists()]
    if found:
        raise ValueError(
            f"{dirpath} already holds a run ({', '.join(found)}). Choose another dirpath (output_dir= of train.py), "
            "delete the folder, or resume that run with ckpt_path="
        )


def read_record(dirpath: Path) -> RunRecord | None:
    """
    Returns the record in a run's folder; None if there is none yet.

    Raises:
        ValueError: `report.json` is damaged, or is not the record of a run.
    """
    path = dirpath / "report.json"
    if not path.is_file():
        return None
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Delete it to see what else the folder holds") from error
    if not isinstance(written, dict) or not isinstance(written.get("perplexity"), dict):
        raise ValueError(f"{path} is not the report of a run, which RunReport writes: it has no perplexity")
    try:
        return RunRecord.from_json(written)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the report of a run, which RunReport writes: {error}") from error
