"""
Writes the tables of the docs anew from benchmarks/results/*.json, so that no number is typed by hand.

    python benchmarks/tables.py          writes them
    python benchmarks/tables.py --check  fails if one is not as the results say

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->` in README.md or a page of docs/.
"""

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGES = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("**/*.md"))]
MARK = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
BEST = "ALPS 2:4, permuted, reconstruction in 3 passes, 96 written"
RECONSTRUCTION = (
    "ALPS 2:4, alone",
    "ALPS 2:4, permuted, alone",
    "ALPS 2:4, reconstruction",
    "ALPS 2:4, quick",
    "ALPS 2:4, reconstruction, 32 written",
    "ALPS 2:4, reconstruction in 3 passes, 96 written",
    BEST,
    "SparseGPT 2:4, alone",
    "SparseGPT 2:4, reconstruction",
    "Wanda 2:4, reconstruction",
    "ALPS 50 %, alone",
    "ALPS 50 %, reconstruction",
    "ALPS 50 %, allocated, reconstruction, 32 written",
    "ALPS 50 %, allocated, reconstruction in 3 passes, 96 written",
    "ALPS 60 %, alone",
    "ALPS 60 %, allocated, quick",
    "ALPS 70 %, alone",
    "ALPS 70 %, allocated, quick",
)


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return found


def rows(header: str, lines: list[str]) -> str:
    """Returns a table in Markdown."""
    return "\n".join([header, "|---" * (header.count("|") - 1) + "|", *lines]) + "\n"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}" if seconds else ""


def reconstruction() -> str:
    """Perplexities and minutes by pruner and setting."""
    cells = results("reconstruction_smollm2_135m")["cells"]
    dense = cells["dense"]
    lines = [f"| dense | {dense['wikitext2']:.2f} | {dense['held_out']:.2f} | | | | |"]
    for name in RECONSTRUCTION:
        if name in cells:
            cell, spent = cells[name], cells[name]["seconds"]
            parts = " | ".join(
                minutes(spent.get(part, 0)) for part in ("all", "writing", "allocation", "reconstruction")
            )
            lines.append(f"| {name} | {cell['wikitext2']:.2f} | {cell['held_out']:.2f} | {parts} |")
    return rows("| | WikiText-2 | C4 | minutes | writing | allocation | reconstruction |", lines)


def recovery() -> str:
    """Perplexity and the share of the lost log-perplexity that came back, by start and number of tokens."""
    return recovered(results("recovery_per_token_smollm2_135m")["cells"])


def best_of(cells: dict[str, Any], start: str, tokens: int) -> dict[str, Any] | None:
    """Returns the cell of the learning rate that is best on the held-out text; None without one."""
    found = [cell for cell in cells.values() if cell.get("start") == start and cell.get("tokens") == tokens]
    return min(found, key=lambda cell: float(cell["held_out"]), default=None)


def recovered(cells: dict[str, Any]) -> str:
    """Returns the table of `recovery` of these cells; of several learning rates the best on held-out text counts."""
    dense = cells["dense"]["reported"]
    trained = [cell for cell in cells.values() if "tokens" in cell]
    counts = sorted({cell["tokens"] for cell in trained})
    lines = []
    for start in dict.fromkeys(cell["start"] for cell in trained):
        pruned = cells[start]["reported"]
        line = f"| {start} | {cells[start]['minutes']:.1f} | {pruned:.2f} |"
        for count in counts:
            best = best_of(cells, start, count)
            if best is None:
                line += " |"
                continue
            share = math.log(pruned / best["reported"]) / math.log(pruned / dense)
            line += f" {best['reported']:.2f} ({share:.0%}, {best['seconds'] / 60:.1f} min) |"
        lines.append(line)
    header = "| start | minutes to make | untrained |" + "".join(f" {count:,} tokens |" for count in counts)
    return rows(header, lines)


STAGES = {
    "ALPS at 2:4": "ALPS 2:4, alone",
    "channels permuted before it": "ALPS 2:4, permuted, alone",
    "blocks reconstructed, on 96 more windows that the dense model wrote": BEST,
}


def stages() -> str:
    """Perplexity after every stage of `recipe=best_2of4`, and the minutes of all stages up to it."""
    cells, trained = (results(f"{name}_smollm2_135m")["cells"] for name in ("reconstruction", "recovery_per_token"))
    lines = [f"| dense | {cells['dense']['wikitext2']:.2f} | {cells['dense']['held_out']:.2f} | |"]
    for name, key in STAGES.items():
        if key in cells:
            cell = cells[key]
            lines.append(
                f"| {name} | {cell['wikitext2']:.2f} | {cell['held_out']:.2f} | {minutes(cell['seconds']['all'])} |"
            )
    best = best_of(trained, BEST, 32768)
    assert best is not None
    spent = cells[BEST]["seconds"]["all"] + best["seconds"]
    lines.append(f"| masked LoRA on 32,768 tokens of C4 | {best['reported']:.2f} | | {minutes(spent)} |")
    return rows("| after | WikiText-2 | C4 | minutes |", lines)


def small_opt() -> str:
    """Perplexities per byte of the model that no setting was chosen on, and what reconstruction brought back."""
    cells = results("reconstruction_small_opt")["cells"]
    dense, lines = cells["dense"]["wikitext2"], []
    for name, cell in cells.items():
        value, alone = cell["wikitext2"], cells.get(name.replace(", reconstruction", ", alone"), {}).get("wikitext2")
        back = f"{math.log(alone / value) / math.log(alone / dense):.0%}" if name.endswith("reconstruction") else ""
        lines.append(f"| {name} | {value:.3f} | {cell['held_out']:.3f} | {back} |")
    return rows("| | WikiText-2 | C4 | of the pruner's loss on WikiText-2 came back |", lines)


TABLES: dict[str, Callable[[], str]] = {
    "reconstruction": reconstruction,
    "recovery-per-token": recovery,
    "stages": stages,
    "small-opt": small_opt,
}


def written(page: str) -> str:
    """Returns a page with its tables made anew; raises KeyError for a table that there is not."""
    return MARK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = written(before)
        if after != before:
            if check:
                raise SystemExit(f"{path.name} is not as the results say: run python benchmarks/tables.py")
            path.write_text(after, encoding="utf-8")
            print(f"wrote the tables of {path.name}")


if __name__ == "__main__":
    main()
