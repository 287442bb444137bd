"""
What is left of the accuracy on handwritten digits at 90 %: iterative magnitude pruning with rewinding, and one-shot.

    OMP_NUM_THREADS=1 python train.py --multirun recipe=digits_imp_90 seed=0,1,2 'output_dir=runs/digits/seed_${seed}'
    python benchmarks/digits.py runs/digits/seed_* [--results FILE.json] [--picture FILE.png]

RUNs are finished runs of `digits_imp_90`, each with its `digits_oneshot_90` inside. Prints a Markdown table of the
accuracy of every run and their mean. For the one-shot run, "pruned" is the accuracy right after pruning.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prune_callbacks.reporting.drawing import COLOURS, save, subplots
from prune_callbacks.storage.run_record import RunRecord, read_record
from prune_callbacks.writing import write_json

METRIC = "val_accuracy"
COLUMNS = {"dense": ("imp", "dense"), "one-shot, pruned": ("one_shot", "pruned")}
COLUMNS |= {"one-shot, recovered": ("one_shot", "recovered"), "iterative": ("imp", "recovered")}
"""The columns of the table: the run, and the stage of its record."""


def finished(folder: Path) -> RunRecord:
    """Returns the record of a finished run; raises ValueError if it is none, or did not hold its masks."""
    record = read_record(folder)
    if record is None or record.stage != "recovered" or METRIC not in record.metrics:
        raise ValueError(f"{folder} is not a finished run of a digits recipe")
    if record.violations:
        raise ValueError(f"{folder}: pruned weights are not zero: {record.violations}")
    return record


def measured(record: RunRecord) -> dict[str, Any]:
    """Returns what the results say of one run."""
    seconds = record.seconds
    return {
        **{stage: round(record.metrics[METRIC][stage], 4) for stage in ("dense", "pruned", "recovered")},
        "sparsity": round(record.sparsity.achieved, 4),
        "optimizer_steps": record.optimizer_steps,
        "seconds": round(seconds.prune + seconds.recover + seconds.evaluate, 1),
        "rounds": [
            {"sparsity": round(entry["sparsity"], 4), METRIC: round(entry["metrics"][METRIC], 4)}
            for entry in record.rounds
        ],
    }


def gathered(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns the results of all runs and their means."""
    seeds: dict[str, Any] = {}
    for folder in folders:
        record, one_shot = finished(folder), finished(folder / "digits_oneshot_90")
        seed = str(OmegaConf.load(folder / "config.yaml").seed)
        if seed in seeds:
            raise ValueError(f"{folder} has seed {seed}, as another of the runs has")
        seeds[seed] = {"imp": measured(record), "one_shot": measured(one_shot)}
    values = {name: [run[kind][stage] for run in seeds.values()] for name, (kind, stage) in COLUMNS.items()}
    means = {name: round(sum(column) / len(column), 4) for name, column in values.items()}
    parts = [part for run in seeds.values() for part in run.values()]
    return {
        "means": means,
        "seeds": seeds,
        "seconds": round(sum(part["seconds"] for part in parts), 1),
        "device": record.device,
        "versions": record.versions,
        "command": record.command,
    }


def table(results: Mapping[str, Any]) -> str:
    """Returns the accuracies as a Markdown table."""
    rows = {seed: [run[kind][stage] for kind, stage in COLUMNS.values()] for seed, run in results["seeds"].items()}
    rows["mean"] = list(results["means"].values())
    lines = ["| seed | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {seed} | {' | '.join(f'{value:.1%}' for value in values)} |" for seed, values in rows.items()]
    return "\n".join(lines)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draws the accuracy over the sparsity, round by round: the mean of the runs, and their range; whole and near."""
    figure, axes = subplots(1, 2, figsize=(11, 4.5))
    imp, means = [run["imp"]["rounds"] for run in results["seeds"].values()], results["means"]
    zeros = [100 * entry["sparsity"] for entry in imp[0]]
    points = [[100 * entry[METRIC] for entry in entries] for entries in zip(*imp, strict=True)]
    mean = [sum(values) / len(values) for values in points]
    for axis in axes:
        label = f"iterative, rewound (mean of {len(imp)} seeds; band: their range)"
        axis.plot(zeros, mean, marker="o", color=COLOURS["dense"], label=label)
        axis.fill_between(zeros, list(map(min, points)), list(map(max, points)), color=COLOURS["dense"], alpha=0.2)
        axis.axhline(100 * means["dense"], color="#999999", linestyle=":", label=f"dense, {means['dense']:.1%}")
        for name, marker, stage in (("one-shot, recovered", "D", "recovered"), ("one-shot, pruned", "X", "pruned")):
            label = f"{name}, {means[name]:.1%}"
            axis.plot(zeros[-1:], [100 * means[name]], marker, color=COLOURS[stage], markersize=8, label=label)
        axis.set_xlabel("zeros in pruned layers, %")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy on digits held out, %")
    axes[0].set_ylim(0, 105)
    axes[0].legend(loc="lower left", fontsize=8)
    axes[1].set_ylim(min(map(min, points)) - 1, 100.2)
    axes[1].set_title("the same, near 100 %", fontsize=10)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    results = gathered(given.runs)
    print(table(results))
    if given.results is not None:
        write_json(given.results, results)
    if given.picture is not None:
        draw(results, given.picture)


if __name__ == "__main__":
    main()
