"""The target folder of a streamed pruning, and its record of finished blocks."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.reconstruction.report import BlockReport
from prune_callbacks.storage.model_folder import MASKS
from prune_callbacks.storage.run_record import RunRecord
from prune_callbacks.streaming.files import remove_folder, write_json
from prune_callbacks.streaming.together import check_same_folder
from prune_callbacks.writing import PARTIAL

REPORT, SCALES, MODEL = "report.json", "scales.safetensors", "model"


class Journal:
    """
    The target folder of one streamed pruning, from the first block to the finished model.

    `model.partial/` gets one file of weights per block. `streaming/` holds all that is needed to resume: the setting,
    the masks and a record of every finished block, and the hidden states that enter the first unfinished block. The
    record of a block is written last and marks the block as finished; a block that was killed in the middle of its
    writing has none and is pruned again. `report.json` marks the pruning as finished.

    Over several ranks, which share the folder, rank 0 writes it, and all that changes it is a collective.

    Args:
        target: the folder; created if it does not exist.
        setting: all settings on which the result depends.
        ranks: the processes.

    Attributes:
        records: the records of the finished blocks, in order.
        report: the report of the finished pruning; None while it is unfinished.

    Raises:
        ValueError: the folder holds other files, or was started with another setting, or ranks see other folders.
    """

    def __init__(self, target: Path, setting: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        self.target, self._ranks = target, ranks
        self.work = target / "streaming"
        self.model = target / f"{MODEL}{PARTIAL}"
        self.report: dict[str, Any] | None
        self.setting: dict[str, Any] = json.loads(json.dumps(setting))
        self.records: list[dict[str, Any]]
        # Only rank 0 reads the folder: on a shared file system the others may see its files late.
        self.records, self.report = ranks.first(self._open)
        if self.report is None:
            check_same_folder(self.work, ranks)

    def commit(self, record: Mapping[str, Any]) -> None:
        """Records the next block as finished; call it after its weights, masks and output hidden states are written."""
        self._ranks.first(lambda: write_json(self._record(len(self.records)), record))
        self.records.append(dict(record))
        self._ranks.first(self._tidy)

    def prepare(self) -> None:
        """
        Checks the files of the finished blocks and creates the model folder; call it before the walk resumes.

        Raises:
            ValueError: a file of a finished block is missing, or its size has changed.
        """
        self._ranks.first(self._prepare)

    def _prepare(self) -> None:
        for number, record in enumerate(self.records):
            for name, size in record["files"].items():
                places = (self.model / name, self.target / MODEL / name, self.work / name)
                self._check(f"of block {number}, which was finished,", name, size, places)
        if not (self.target / MODEL).exists():  # otherwise the remaining files are written next to it
            self.model.mkdir(exist_ok=True)
        self._tidy()

    def check_finished(self) -> None:
        """Raises ValueError if a file of the finished model is missing, or its size has changed."""
        assert self.report is not None
        files = self.report["files"]

        def check() -> None:
            for name, size in files.items():
                self._check("of the finished model", name, size, [self.target / MODEL / name, self.target / name])

        self._ranks.first(check)

    def _check(self, whose: str, name: str, size: int, places: Sequence[Path]) -> None:
        sizes = [path.stat().st_size for path in places if path.is_file()]
        if sizes != [size]:
            found = f"has {sizes[0]} bytes instead of {size}" if sizes else "is missing"
            raise ValueError(
                f"{name} {whose} {found} in {self.target}: it was changed by something else. Put it back, or delete "
                "the folder to start again"
            )

    def _tidy(self) -> None:
        """Removes hidden states that are incomplete or no longer needed."""
        needed = (self.hidden(len(self.records)), self.dense(len(self.records)))
        for folder in sorted([*self.work.glob("hidden_*"), *self.work.glob("dense_*")]):
            if folder not in needed:
                remove_folder(folder)

    def finish(self, report: RunRecord) -> dict[str, Any]:
        """Writes the report, which marks the pruning as finished, and removes the working files; returns the report."""
        finished = replace(report, setting=dict(self.setting)).to_json()
        write_json(self.target / REPORT, finished)
        remove_folder(self.work)
        return finished

    def discard(self) -> None:
        """Removes the working files of a pruning without a finished block, and the target if it holds nothing else."""
        assert not self.records
        if self._ranks.rank == 0:
            remove_folder(self.work)
            remove_folder(self.model)
            with suppress(OSError):
                self.target.rmdir()

    def reconstructed(self) -> list[BlockReport]:
        """Returns the reports of the blocks that were reconstructed so far, in killed calls too."""
        return [BlockReport(**block) for record in self.records for block in record.get("reconstruction", ())]

    def hidden(self, index: int) -> Path:
        """Returns the folder of the hidden states that enter a block."""
        return self.work / f"hidden_{index:05d}"

    def dense(self, index: int) -> Path:
        """Returns the folder of the hidden states that enter a block in the dense model; only reconstruction has it."""
        return self.work / f"dense_{index:05d}"

    def check_hidden(self, index: int, *, dense: bool) -> None:
        """Raises ValueError if hidden states that enter the first unfinished block are missing; a collective."""

        def check() -> None:
            needed = [self.hidden(index)] + ([self.dense(index)] if dense else [])
            missing = next((folder for folder in needed if not folder.is_dir()), None)
            if index > 0 and missing is not None:
                raise ValueError(
                    f"{missing} is missing, with the hidden states that enter block {index}, the first unfinished one: "
                    f"pruning cannot resume without it. Put it back, or delete {self.target} to start again"
                )

        self._ranks.first(check)

    def masks(self, index: int) -> Path:
        """Returns the path of the masks of a block."""
        return self.work / f"masks_{index:05d}.safetensors"

    def scales(self, index: int) -> Path:
        """Returns the path of the quantization scales of a block; the file exists only for pruners that quantize."""
        return self.work / f"scales_{index:05d}.safetensors"

    def _record(self, index: int) -> Path:
        return self.work / f"block_{index:05d}.json"

    def _open(self) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Begins the folder, or checks that it was begun with the same setting; returns the records and the report."""
        before = self._begun_with()
        if before is None:
            self._begin()
        elif before != self.setting:
            raise ValueError(
                f"{self.target} was started with another setting: {difference(before, self.setting)}. Choose another "
                "folder, repeat the earlier setting to resume, or delete the folder to start again"
            )
        records: list[dict[str, Any]] = []
        while self._record(len(records)).is_file():
            records.append(_read(self._record(len(records))))
        if not (self.target / REPORT).is_file():
            return records, None
        report = _read(self.target / REPORT)
        remove_folder(self.work)
        return records, report

    def _begun_with(self) -> dict[str, Any] | None:
        for path in (self.work / "setting.json", self.target / REPORT):
            if path.is_file():
                with suppress(KeyError):
                    before: dict[str, Any] = _read(path)["setting"]
                    return before
        return None

    def _begin(self) -> None:
        found = [name for name in (REPORT, MASKS, MODEL, self.model.name) if (self.target / name).exists()]
        if found:
            raise ValueError(
                f"{self.target} already holds something else ({', '.join(found)}), which is not written over. Choose "
                "another target, or delete the folder"
            )
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.work / "setting.json", {"setting": self.setting})


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Delete the folder to start again") from error
    return record


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns in words how two settings differ; "" if they do not."""
    parts = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            parts.append(f"{key}: {difference(old, new)}")
        elif isinstance(old, list) and isinstance(new, list) and old != new:
            order = ", in another order or repeated" if set(old) == set(new) else ""
            parts.append(f"{key} were {_told(old, new)} and are {_told(new, old)}{order}")
        elif old != new:
            parts.append(f"{key} was {old} and is {new}")
    return "; ".join(parts)


def _told(items: Sequence[Any], others: Sequence[Any]) -> str:
    """Returns the number of items, and the first three that are not among the others."""
    known = set(others)
    only = [str(item) for item in items if item not in known]
    more = f" and {len(only) - 3} more" if len(only) > 3 else ""
    return f"{len(items)}" + (f" (among them {', '.join(only[:3])}{more})" if only else "")
