"""Runs `sensitivity` on a data module; writes a file and a picture, and prints a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from prune_callbacks.pruners import Pruner
from prune_callbacks.reporting.sensitivity import draw_sensitivity
from prune_callbacks.studies.sensitivity import Sensitivity, Unit, sensitivity

SHOWN = 15
"""Number of units in the printed table."""


@runtime_checkable
class CalibrationAndEvaluation(Protocol):
    """The part of a data module, such as `TokenDataModule`, that a study needs."""

    calibration_windows: Tensor | None
    evaluation_windows: Tensor | None
    evaluation_title: str
    calibration_batch_size: int

    def setup(self, stage: str) -> None: ...


def measure_sensitivity(
    model: nn.Module,
    data: CalibrationAndEvaluation,
    pruner: Pruner,
    dirpath: str | Path,
    *,
    name: str | None = None,
    unit: Unit = "layer",
    targets: Sequence[str] | str | None = None,
    batch_size: int = 1,
    min_expert_tokens: int = 32,
) -> Sensitivity:
    """
    Runs `sensitivity`, writes `sensitivity.json` and `sensitivity.png` to `dirpath`, and prints a table.

    An interrupted measurement resumes from the file.

    Args:
        model: a causal LM.
        data: a data module with calibration and evaluation windows.
        pruner: the pruner for every unit.
        dirpath: the folder; created if needed.
        name: name of the model, for the file.
        unit: "layer" or "block".
        targets: patterns of layer names; None for all linear layers and experts of the decoder blocks but routers.
        batch_size: evaluation windows per forward pass.
        min_expert_tokens: as in `sensitivity`.

    Returns:
        the result of `sensitivity`.

    Raises:
        ValueError: as in `sensitivity`.
    """
    data.setup("fit")
    assert data.calibration_windows is not None
    assert data.evaluation_windows is not None
    folder = Path(dirpath)
    folder.mkdir(parents=True, exist_ok=True)
    measured = sensitivity(
        model,
        data.calibration_windows.split(data.calibration_batch_size),
        data.evaluation_windows,
        pruner,
        unit=unit,
        targets=targets,
        batch_size=batch_size,
        min_expert_tokens=min_expert_tokens,
        path=folder / "sensitivity.json",
        setting={"model": name, "text": data.evaluation_title, "calibration": list(data.calibration_windows.shape)},
    )
    seq_len = data.evaluation_windows.shape[1]
    table = Table(title=f"perplexity {measured.dense:.2f} (windows of {seq_len}) rises by, when one {unit} is pruned")
    table.add_column(unit, overflow="fold", min_width=36)
    for column in ("increase", "relative loss", "shift"):
        table.add_column(column, justify="right")
    for part in sorted(measured.increase, key=lambda n: -measured.increase[n])[:SHOWN]:
        loss, shift = measured.proxy[part], measured.shift[part]
        table.add_row(part, f"{measured.increase[part]:+.3f}", f"{loss:.3f}", f"{shift:.2g}")
    Console().print(table)
    if len(measured.increase) > SHOWN:
        Console().print(f"the {SHOWN} of {len(measured.increase)} that cost most; sensitivity.json has all")
    Console().print(
        f"rank correlation (Spearman) of increase and loss {measured.rank_correlation:.2f}, of increase and shift "
        f"{measured.shift_rank_correlation:.2f}"
    )
    draw_sensitivity(measured.increase, measured.dense, seq_len, folder / "sensitivity.png")
    return measured
