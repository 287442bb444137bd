"""Lists the time, the tokens and the effect of every stage of a run."""

from statistics import mean
from typing import Any, NamedTuple

from prune_callbacks.storage.run_record import Perplexities, RunRecord


class Cost(NamedTuple):
    """
    The cost of a stage.

    Attributes:
        stage: its name.
        seconds: its wall time; None: not known.
        tokens: how many tokens it has seen; None: not known.
        gave: the effect on the model, in words; "" if none was measured.
    """

    stage: str
    seconds: float | None
    tokens: int | None
    gave: str


def stage_costs(record: RunRecord) -> list[Cost]:
    """Returns the costs of a run's stages, in order: pruning and training, and others that the run had."""
    measured, rebuilt = record.perplexity, record.reconstruction
    costs = []
    if record.permuting:
        gave = "an order of the channels of which the pattern keeps more"
        costs.append(Cost("permuting", record.permuting["seconds"], None, gave))
    if record.writing:
        gave = f"{record.writing['windows']:.0f} more calibration windows, by the dense model"
        costs.append(Cost("writing windows", record.writing["seconds"], None, gave))
    prune = record.seconds.prune
    if record.allocating:
        costs.append(Cost("allocation", record.allocating["seconds"], None, "a sparsity for every layer"))
    if prune is not None:
        prune -= sum(part["seconds"] for part in (rebuilt, record.allocating) if part)
    costs.append(
        Cost("pruning", prune, record.tokens.get("prune"), "" if rebuilt else _step(measured, "dense", "pruned"))
    )
    if rebuilt:
        costs.append(
            Cost("reconstruction", rebuilt["seconds"], rebuilt["tokens"], _rebuilt(measured, rebuilt["blocks"]))
        )
    costs.append(
        Cost("training", record.seconds.recover, record.tokens.get("recover"), _step(measured, "pruned", "recovered"))
    )
    return costs


def _step(measured: Perplexities, before: str, after: str) -> str:
    first, second = measured.at(before), measured.at(after)
    return "" if first is None or second is None else f"perplexity {first:.2f} to {second:.2f}"


def _rebuilt(measured: Perplexities, blocks: list[dict[str, Any]]) -> str:
    """Returns what pruning and reconstruction gave together: no perplexity is measured between the two."""
    if not blocks:
        return "no block was trained"
    before, after = (mean(block[key] for block in blocks) for key in ("before", "after"))
    together = _step(measured, "dense", "pruned")
    return f"relative error of a block {before:.3g} to {after:.3g}" + (f"; with pruning {together}" if together else "")
