"""Measures quality over sparsity, or over any other setting: prunes one model many times, one point at a time."""

import atexit
import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console
from torch import Tensor, nn

from prune_callbacks.allocation.protocol import Allocation
from prune_callbacks.engine.sequential import prune_sequentially
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.memory import reset_peak_memory
from prune_callbacks.pruners import Pruner
from prune_callbacks.pruners.identity import identity
from prune_callbacks.reporting.curves import draw_curves, sweep_table
from prune_callbacks.sparsity.questions import kept_of_group
from prune_callbacks.storage.cells import open_results
from prune_callbacks.studies.sensitivity_job import CalibrationAndEvaluation
from prune_callbacks.writing import write_json


@runtime_checkable
class SweepData(CalibrationAndEvaluation, Protocol):
    """A `CalibrationAndEvaluation` that also reports, before `setup`, the settings that determine its windows."""

    @property
    def setting(self) -> Mapping[str, str | int | None]: ...


@dataclass
class _Kept:
    """The dense model and the token windows, which later points in the process reuse, and the settings behind them."""

    make: Callable[[], nn.Module] | None = None
    device: str | None = None
    model: nn.Module | None = None
    dense: dict[str, Tensor] | None = None
    data: SweepData | None = None


_kept = _Kept()


def sweep_point(
    model: Callable[[], nn.Module],
    data: SweepData,
    pruner: Pruner,
    dirpath: str | Path,
    *,
    name: str | None = None,
    allocation: Allocation | None = None,
    targets: Sequence[str] | str | None = None,
    device: str | None = None,
    along: str = "sparsity",
    at: int | float | str | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Prunes the dense model, measures it, and adds the point to `dirpath/sweep.json`, unless the file has it already.

    Equivalent to `prune_sequentially` on a fresh model for every point. The model, its dense perplexity and the token
    windows are made once and kept for later points. Calibration statistics are not kept, because the inputs of every
    block depend on the pruning of the blocks before it. `sweep.png` is drawn again after every point.

    Args:
        model: function that returns the dense model, a causal LM; called once per process.
        data: a data module with calibration and evaluation windows.
        pruner: the pruner of this point.
        dirpath: the folder.
        name: name of the model.
        allocation: spreads the sparsity over layers; None: evenly.
        targets: patterns of layer names; None for all linear layers of the decoder blocks.
        device: where blocks are pruned and perplexity is measured; None: where the model is.
        along: the setting on the horizontal axis; "sparsity" is that of the pattern.
        at: value of this point on any other axis; None stands for "all".
        batch_size: evaluation windows per forward pass.
        progress: show progress bars.

    Returns:
        the point: perplexity (None if not finite), achieved sparsity, seconds and peak_memory_bytes of pruning, and its
        settings.

    Raises:
        ValueError: the folder holds a sweep of another model or evaluation text.
        ValueError, RuntimeError: pruning or measuring failed; the error is written to the file, and the next call with
            the same settings tries again.
    """
    folder, setting = Path(dirpath), dict(data.setting)
    calibration = {key: setting.pop(key) for key in ("calibration", "calibration_windows", "seed")}
    source = setting.pop("calibration_source")
    described = {"model": name, "along": along} | setting
    results = open_results(folder / "sweep.json", described)
    key = f"{pruner!r}, {calibration['calibration_windows']} windows of {source}, seed {calibration['seed']}"
    key += "".join(f", {told}" for told in (_told(allocation), targets and repr(targets)) if told)
    found = results["cells"].get(key)
    if found is not None and "error" not in found:
        Console().print(f"{key}: measured before", markup=False, highlight=False, soft_wrap=True)
        return dict(found)
    network = _dense_model(model, device)
    calibrating, evaluating = _windows(data)
    point: dict[str, Any] = {
        "series": _series(pruner, allocation, along),
        "at": pruner.pattern.sparsity if along == "sparsity" else at,
        "pruner": repr(pruner),
        "allocation": None if allocation is None else repr(allocation),
    } | calibration
    where = next(network.parameters()).device
    try:
        if "dense" not in results:
            results["dense"] = perplexity(network, evaluating, batch_size=batch_size, progress=progress)
        reset_peak_memory(where)
        how: dict[str, Any] = {"targets": targets, "allocation": allocation, "progress": progress}
        report = prune_sequentially(network, calibrating.split(data.calibration_batch_size), pruner, **how)
        value = perplexity(network, evaluating, batch_size=batch_size, progress=progress)
    except (ValueError, RuntimeError) as error:
        _keep(folder, described, key, point | {"error": str(error)}, results.get("dense"))
        raise
    found = point | {
        "perplexity": value if math.isfinite(value) else None,
        "sparsity": report.sparsity,
        "seconds": round(report.seconds, 2),
        "peak_memory_bytes": report.peak_memory_bytes,
        "skipped": len(report.skipped),
    }
    draw_curves(_keep(folder, described, key, found, results["dense"]), folder / "sweep.png")
    Console().print(f"{key}: perplexity {value:.2f}", markup=False, highlight=False, soft_wrap=True)
    return found


def _keep(folder: Path, setting: dict[str, Any], key: str, cell: dict[str, Any], dense: float | None) -> dict[str, Any]:
    """Adds a point to the current file, which may have new points of other processes; returns its content."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".sweep.lock").open("w") as lock:
        with suppress(OSError, ImportError):  # file systems without locks, and Windows
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        results = open_results(folder / "sweep.json", setting)
        results["cells"][key] = cell
        if dense is not None:
            results["dense"] = dense
        write_json(folder / "sweep.json", results)
    return results


def _dense_model(make: Callable[[], nn.Module], device: str | None) -> nn.Module:
    """Returns the model with its dense weights; reuses that of the process if `make` and `device` are the same."""
    if not _same(make, _kept.make) or _kept.device != device or _kept.model is None or _kept.dense is None:
        _kept.make, _kept.device, _kept.model, _kept.dense = make, device, None, None  # frees the old one
        made = make().to(device) if device is not None else make()
        _kept.model, _kept.dense = made, copy.deepcopy({n: p.data for n, p in made.named_parameters()})
    with torch.no_grad():
        for parameter_name, parameter in _kept.model.named_parameters():
            parameter.copy_(_kept.dense[parameter_name])
    return _kept.model


def _same(one: Any, other: Any) -> bool:
    """Compares functions by identity, but partials by value: Hydra makes a new one for every point."""
    if isinstance(one, partial) and isinstance(other, partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return one is other


def _windows(data: SweepData) -> tuple[Tensor, Tensor]:
    """Returns calibration and evaluation windows; reuses those of an earlier point with equal texts and tokenizer."""
    kept = _kept.data
    if kept is None or kept.setting != data.setting or _vocabulary(kept) != _vocabulary(data):
        data.setup("fit")
        _kept.data = kept = data
    assert kept.calibration_windows is not None
    assert kept.evaluation_windows is not None
    return kept.calibration_windows, kept.evaluation_windows


def _vocabulary(data: SweepData) -> Any:
    tokenizer: Any = getattr(data, "tokenizer", None)
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else tokenizer


def _told(allocation: Any) -> str | None:
    """Returns an allocation's repr with a hash of the fields it hides, such as its sensitivities; None without one."""
    if allocation is None:
        return None
    hidden = [getattr(allocation, f.name) for f in fields(allocation) if not f.repr] if is_dataclass(allocation) else []
    mark = hashlib.sha256(repr(hidden).encode()).hexdigest()[:12]
    return f"{allocation!r}" + (f" of {mark}" if hidden and hidden != [None] * len(hidden) else "")


def _series(pruner: Pruner, allocation: Allocation | None, along: str) -> str:
    """Returns the name of the curve of a point: pruner, pattern, changed settings and allocation."""
    pattern = pruner.pattern
    group, kind = kept_of_group(pattern), type(pattern).__name__.lower()
    if along == "sparsity":
        kind = kind if group is None else "N:M"
    else:
        kind = f"{kind} {pattern.sparsity:.4g}" if group is None else f"{group[0]}:{group[1]}"
    known: tuple[Field[Any], ...] = fields(pruner) if is_dataclass(pruner) else ()
    own = {f.name: getattr(pruner, f.name) for f in known if f.name not in ("pattern", along.replace(" ", "_"))}
    defaults = {f.name: f.default for f in known}
    changed = [f"{n}={identity(v) if callable(v) else v}" for n, v in own.items() if v != defaults[n]]
    return ", ".join([type(pruner).__name__, kind, *changed, *([type(allocation).__name__] if allocation else [])])


_folders: set[Path] = set()


def sweep_job(dirpath: str | Path, **settings: Any) -> dict[str, Any]:
    """Runs `sweep_point` with `dirpath` and `settings`, and prints the table of all points when the process exits."""
    folder = Path(dirpath)
    if folder not in _folders:
        _folders.add(folder)
        atexit.register(sweep_table, folder / "sweep.json")
    return sweep_point(dirpath=folder, **settings)
