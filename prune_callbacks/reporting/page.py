"""Writes report.html: a self-contained page about one run, for readers who did not run it."""

import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prune_callbacks.reporting.costs import stage_costs
from prune_callbacks.reporting.drawing import (
    CORNER,
    draw_corner,
    draw_curve,
    embedded,
    heat_map,
    place,
    plain_text,
    subplots,
)
from prune_callbacks.reporting.metrics import curves_of_rounds, plain_number, quantities
from prune_callbacks.reporting.reconstruction import reconstruction_picture
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.storage.run_folder import Run, read_run
from prune_callbacks.storage.run_record import STAGES, RunRecord
from prune_callbacks.writing import write_text

Record = RunRecord

NONE = "-"
"""Placeholder for values that were not measured."""


def write_page(dirpath: str | Path, path: Path | None = None) -> Path:
    """
    Writes the page of a run, finished or not, and returns its path.

    Args:
        dirpath: the folder of the run.
        path: the file; None for `report.html` in the folder of the run.

    Raises:
        ValueError: the folder does not hold a run, or its `report.json` is not the report of a run.
    """
    run = read_run(dirpath)
    path = run.dirpath / "report.html" if path is None else path
    write_text(path, render_page(run))
    return path


def render_page(run: Run) -> str:
    """Returns the page of a run as HTML."""
    record = run.record
    losses = {name: loss for name, loss in record.reconstruction_loss.items() if loss is not None}
    return render(
        "run.html",
        run=run,
        record=record,
        title=f"{record.recipe or 'Run'}: {record.model or 'a model'}",
        verdict=verdict(record),
        stages=stage_names(record),
        text=", ".join(f"{name.replace('_', ' ')}: {_word(value)}" for name, value in record.text.items()) or None,
        violations=sum(record.violations.values()) if record.violations is not None else None,
        sparsity_map=heat_map(record.sparsity.layers, "zeros", percent=True) if record.sparsity.layers else None,
        loss_map=heat_map(losses, "relative squared error", percent=False) if losses else None,
        reconstruction=reconstruction_picture(record.reconstruction) if record.reconstruction.get("blocks") else None,
        training=_training(record) if record.training_loss else None,
        quantities=quantities([record]),
        costs=stage_costs(record),
        rounds=_rounds(record) if len(record.rounds) > 1 else None,
        masks=mask_pictures(run.masks) if run.masks is not None else [],
    )


def render(template: str, **values: Any) -> str:
    """Returns a template of this package as HTML, with all values escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "plain_number": plain_number,
        "percent": percent,
        "duration": duration,
        "size": size,
    }
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return environment.get_template(template).render(values | {"STAGES": STAGES, "NONE": NONE, "written": written})


def number(value: float | None) -> str:
    """Formats a perplexity: two decimals below 1000, none below 1e7, else three significant digits."""
    if value is None:
        return NONE
    return f"{value:.2f}" if value < 1e3 else f"{value:.0f}" if value < 1e7 else f"{value:.3g}"


def percent(value: float | None, digits: int = 2) -> str:
    """Formats a fraction as a percentage."""
    return NONE if value is None else f"{value:.{digits}%}".replace("%", " %")


def duration(seconds: float | None) -> str:
    """Formats seconds as seconds, minutes or hours."""
    if seconds is None:
        return NONE
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int | None) -> str:
    """Formats bytes in GiB."""
    return NONE if count is None else f"{count / 2**30:.2f} GiB"


def stage_names(record: Record) -> dict[str, str]:
    """Returns when each of the three models was measured, in words, by stage."""
    if record.schedule:
        return {
            "dense": "trained, before the masks' first change",
            "pruned": "right after the masks' last change",
            "recovered": "at the end of training",
        }
    return {"dense": "before pruning", "pruned": "right after pruning", "recovered": "after training with masks held"}


def share_recovered(record: Record) -> float | None:
    """
    Returns the fraction of the rise in perplexity that training took back: (pruned - recovered) / (pruned - dense).

    Returns None if a value is missing, if pruning raised perplexity by less than 1 %, or if masks changed during
    training: the three values then differ by more than pruning.
    """
    measured = record.perplexity
    dense, pruned, recovered = measured.dense, measured.pruned, measured.recovered
    if record.schedule or dense is None or pruned is None or recovered is None or pruned < 1.01 * dense:
        return None
    return (pruned - recovered) / (pruned - dense)


def verdict(record: Record) -> list[str]:
    """Describes the result of a run in plain sentences."""
    measured, sentences = record.perplexity, []
    if record.sparsity.achieved is not None:
        layers = len(record.sparsity.layers)
        sentences.append(f"{percent(record.sparsity.achieved)} of the weights of {layers} layers are zero.")
    dense, recovered = measured.dense, measured.recovered
    share = share_recovered(record)
    if share is None:
        if dense is not None and recovered is not None:
            change = "higher" if recovered > dense else "lower"
            sentences.append(
                f"At the end perplexity is {percent(abs(recovered / dense - 1), 1)} {change} than {_before(record)}."
            )
    elif share < 0:
        sentences.append("Training after pruning made perplexity worse than pruning left it.")
    elif share > 1:
        sentences.append(
            "Training after pruning took back all of what pruning cost, and more: the sparse model now fits this "
            "text better than the dense one, which was not trained on text of this kind here."
        )
    else:
        sentences.append(f"Training after pruning took back {percent(share, 0)} of what pruning cost in perplexity.")
    return sentences


def _word(value: Any) -> str:
    return str(value) if not isinstance(value, bool) else "yes" if value else "no"


def _before(record: Record) -> str:
    return "before the masks' first change" if record.schedule else "before pruning"


@plain_text
def _training(record: Record) -> str:
    figure, axis = subplots(figsize=(9, 3.6))
    for step in record.changes:
        axis.axvline(step, color="#e69500", linestyle=":", linewidth=1)
    draw_curve(axis, record.training_loss, color="#4c78a8", marker="." if len(record.training_loss) < 40 else None)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss")
    axis.spines[["top", "right"]].set_visible(False)
    return embedded(figure)


@plain_text
def _rounds(record: Record) -> str:
    perplexity = f"perplexity, windows of {record.perplexity.seq_len}"
    return embedded(curves_of_rounds({"trained": record.rounds}, quantities([record]), perplexity))


def mask_pictures(masks: MaskSet) -> list[dict[str, Any]]:
    """
    Draws the upper left corners of three masks: the first one, one from the middle, and the last one.

    Returns:
        for each mask: `name`, `picture` (a `data:` URI), `shape` of the layer, `shown` (rows and columns), and
        `sparsity` of the whole layer.
    """
    pictures = []
    for name in _three(list(masks)):
        whole = masks[name]
        keep = (whole[0] if whole.ndim == 3 else whole.flatten(1)).numpy()  # the first of several experts
        shown = [min(limit, length) for limit, length in zip(CORNER, keep.shape, strict=True)]
        sparsity = 1 - float(whole.float().mean())
        pictures.append(
            {"name": name, "picture": draw_corner(keep), "shape": keep.shape, "shown": shown, "sparsity": sparsity}
        )
    return pictures


def _three(names: list[str]) -> list[str]:
    """Returns up to three names: the first, one from the middle block, the last; of different kinds if possible."""
    if not names:
        return []
    middle = [name for name in names if place(name)[0] == place(names[len(names) // 2])[0]]
    return list(dict.fromkeys([names[0], middle[len(middle) // 2], names[-1]]))
