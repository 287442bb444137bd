"""
Every callback on every kind of module: are its masks those of re-running the whole module in float64?

    python tests/every_module.py        write docs/modules.md, and print the table that the README quotes
"""

import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import test_any_module as cells
import torch
from lightning.pytorch.utilities import disable_possible_user_warnings
from zoo import KINDS, made

COLUMNS = (*cells.PRUNERS, "IterativePrune", "MaskEnforcer")


def outcome(kind, column):
    """Runs a cell: "=" if its masks are those of the reference, else the sentence of the refusal, or "differs"."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if column == "IterativePrune":
                cells.test_iterative_pruning_removes_the_smallest_of_all_layers(kind, folder)
            elif column == "MaskEnforcer":
                cells.test_the_enforcer_finds_and_holds_the_zeros(kind, folder)
            else:
                cells.test_one_shot_equals_rerunning_the_whole_module(kind, column, folder)
        except ValueError as error:
            return f"refused: {error}"
        except AssertionError:
            return "differs"
    return "="


def size(kind):
    """The number of weights of a kind that are pruned by default, and of all its parameters."""
    step, _, stages, _ = made(kind)
    pruned = sum(weight.numel() for weight in cells.weights_of(step, stages).values())
    return pruned, sum(parameter.numel() for parameter in step.parameters())


def table():
    """The rows of the table, as Markdown."""
    rows = [f"| module | {' | '.join(COLUMNS)} | pruned by default |", "|---" * (len(COLUMNS) + 2) + "|"]
    for kind in KINDS:
        pruned, every = size(kind)
        found = [outcome(kind, column) for column in COLUMNS]
        rows.append(f"| {kind} | {' | '.join(found)} | {pruned} of {every} parameters |")
        print(rows[-1], file=sys.stderr)
    return rows


def main():
    disable_possible_user_warnings()
    rows = table()
    page = f"""# Modules

What `python tests/every_module.py` found with torch {version("torch")}, transformers {version("transformers")} and
lightning {version("lightning")}, on small modules with random weights in float64 (`tests/zoo.py`), a fit of two steps
each. Every cell is a test of `tests/test_any_module.py`.

- `=` under a pruner: `OneShotPrune` at 50 % gives the masks of running the whole module again for every stage, written
  without this package (`rerun` in `tests/zoo.py`), bit for bit, and no pruned weight is different from zero after
  training with `MaskEnforcer`. Of the GRU all matrices are pruned by magnitude.
- `=` under `IterativePrune`: the smallest half of all layers together is gone, and stays gone.
- `=` under `MaskEnforcer`: it finds the zeros of a sparse module and holds them; without it they are lost.

"""
    (Path(__file__).parents[1] / "docs/modules.md").write_text(page + "\n".join(rows) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
