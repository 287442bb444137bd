"""
prune_checkpoint against the whole model in memory, in processes of their own: peak memory, seconds, and whether the
results are the same; and a run that is killed again and again.

    python benchmarks/streaming.py WINDOWS.safetensors [--model FOLDER] [--repeats 3] [--kills 20]

WINDOWS has token ids (windows, tokens) under "calibration". In memory means from_pretrained, prune_sequentially and
save_pretrained. The memory is the process's largest resident set (VmHWM), Python and all libraries included; what they
take by themselves is measured too. The kills are SIGKILLs at random moments of runs of
the model with Wanda 2:4, on 4 windows of 128.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PACKAGE = Path(__file__).parent.parent
BATCH = 1
"""Windows in a forward pass, in both."""


def imports() -> None:
    import transformers.modeling_utils  # noqa: F401

    import prune_callbacks.streaming  # noqa: F401


def in_memory(model: str, windows: str, target: str) -> None:
    from transformers import AutoModelForCausalLM

    from prune_callbacks import SparseGPT, Unstructured, prune_sequentially

    loaded = AutoModelForCausalLM.from_pretrained(model)
    batches = load_file(windows)["calibration"].long().split(BATCH)
    report = prune_sequentially(loaded, batches, SparseGPT(Unstructured(0.5)), progress=False)
    loaded.save_pretrained(Path(target) / "model")
    report.masks.save(Path(target) / "masks.safetensors")


def streamed(model: str, windows: str, target: str, pruner: Any, **settings: Any) -> None:
    from prune_callbacks import prune_checkpoint
    from prune_callbacks.ranks import launched_ranks

    batches = load_file(windows)["calibration"].long().split(BATCH)
    with launched_ranks(torch.device("cpu")) as ranks:
        prune_checkpoint(model, target, pruner, batches, progress=False, ranks=ranks, **settings)


def streaming(model: str, windows: str, target: str) -> None:
    from prune_callbacks import SparseGPT, Unstructured

    streamed(model, windows, target, SparseGPT(Unstructured(0.5)))


def reconstructing(model: str, windows: str, target: str) -> None:
    from prune_callbacks import BlockReconstruction, SparseGPT, Unstructured

    streamed(model, windows, target, SparseGPT(Unstructured(0.5)), reconstruction=BlockReconstruction(passes=1))


def few_windows(model: str, windows: str, target: str) -> None:
    from prune_callbacks import NM, Wanda

    streamed(model, windows, target, Wanda(NM(2, 4)))


RECONSTRUCTED = "streaming, reconstructed in one pass"
WAYS = {"imports alone": imports, "in memory": in_memory, "streaming": streaming, RECONSTRUCTED: reconstructing}
WAYS["few windows"] = few_windows


def child(way: str, arguments: list[str]) -> None:
    """What runs in a process of its own; the last line says how it went."""
    begin = time.perf_counter()
    WAYS[way](*arguments)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"peak_bytes": 1024 * peak, "seconds": round(time.perf_counter() - begin, 1)}))


def start(way: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--child", way, *arguments]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE), "HF_HUB_OFFLINE": "1"} | variables
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def measured(way: str, *arguments: str, ranks: int = 1, **variables: str) -> dict[str, Any]:
    """Returns the peak memory of a way and its seconds: of several ranks the largest."""
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} for rank in range(ranks)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [start(way, *arguments, **variables, **(place | address if ranks > 1 else {})) for place in places]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{way} failed: run it by itself with --child")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    result = {key: max(one[key] for one in found) for key in ("peak_bytes", "seconds")}
    print(f"{way}, {ranks} ranks: {result['peak_bytes'] / 2**20:.0f} MiB, {result['seconds']} s", flush=True)
    return result


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


def tensors(folder: Path) -> dict[str, Path]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def equal(first: Path, second: Path) -> dict[str, Any]:
    """Weights and masks of two results, tensor by tensor."""
    from prune_callbacks import MaskSet

    places = [tensors(folder / "model") for folder in (first, second)]
    different = sorted(set(places[0]) ^ set(places[1]))
    for name in set(places[0]) & set(places[1]):
        values = []
        for place in places:
            with safe_open(place[name], framework="pt") as file:
                values.append(file.get_tensor(name))
        if values[0].dtype != values[1].dtype or not torch.equal(*values):
            different.append(name)
    masks = [MaskSet.load(folder / "masks.safetensors") for folder in (first, second)]
    return {"tensors": len(places[0]), "different_tensors": len(different), "same_masks": masks[0] == masks[1]}


def digest(folder: Path) -> str:
    """Of all files but the report, which holds times."""
    content = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "report.json"):
        content.update(str(path.relative_to(folder)).encode())
        content.update(path.read_bytes())
    return content.hexdigest()


def kills(count: int, model: str, windows: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Each run is killed at one random moment of its work, and then made again to its end."""
    from prune_callbacks import NM, Wanda

    few = folder / "few.safetensors"
    save_file({"calibration": load_file(windows)["calibration"][:4, :128].clone()}, few)

    def begin(name: str) -> "multiprocessing.process.BaseProcess":
        # Forked: a process that has imported everything already spends its time on the work.
        process = multiprocessing.get_context("fork").Process(
            target=streamed, args=(model, str(few), str(folder / name), Wanda(NM(2, 4)))
        )
        process.start()
        return process

    def finish(name: str) -> None:
        process = begin(name)
        process.join()
        if process.exitcode:
            raise SystemExit(f"a run failed with {process.exitcode}, which nobody had killed: nothing can be compared")

    started = time.perf_counter()
    finish("undisturbed")
    work, wanted = time.perf_counter() - started, digest(folder / "undisturbed")
    runs: list[dict[str, Any]] = []
    chance = random.Random(seed)
    while len(runs) < count:
        target = folder / "killed"
        process = begin(target.name)
        moment = chance.uniform(0, work)
        process.join(moment)
        process.kill()
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise SystemExit(f"a run failed with {process.exitcode} by itself")
        if process.exitcode == -signal.SIGKILL:  # else it had ended before, and nothing was killed
            finished = len(list(target.glob("streaming/block_*.json")))
            finish(target.name)
            runs.append(
                {
                    "after_seconds": round(moment, 1),
                    "finished_blocks": finished,
                    "same_bytes": digest(target) == wanted,
                }
            )
            print(runs[-1], flush=True)
        shutil.rmtree(target, ignore_errors=True)
    return {"seconds_of_a_run": round(work, 1), "runs": runs, "same": sum(run["same_bytes"] for run in runs)}


def in_turns(
    base: str, other: str, model: str, windows: str, folder: Path, repeats: int
) -> tuple[dict[str, Any], float]:
    """Runs two ways in turns; returns all runs and the ratio of the median peaks: the heap scatters by chance."""
    runs: dict[str, Any] = {base: [], other: []}
    for _ in range(repeats):
        for way in runs:
            shutil.rmtree(folder / way, ignore_errors=True)
            runs[way].append(measured(way, model, windows, str(folder / way)))
    peaks = {way: statistics.median(run["peak_bytes"] for run in of_way) for way, of_way in runs.items()}
    return runs, round(peaks[other] / peaks[base], 4)


def compared(model: str, windows: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Streaming and the whole model in memory, and whether they end the same."""
    cell, ratio = in_turns("in memory", "streaming", model, windows, folder, repeats)
    return cell | {"peak_over_in_memory": ratio, "equality": equal(folder / "in memory", folder / "streaming")}


def reconstructed(model: str, windows: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Streaming without and with reconstruction, taking turns; a pass more takes time and no memory."""
    cell, ratio = in_turns("streaming", RECONSTRUCTED, model, windows, folder, repeats)
    return cell | {"peak_over_streaming": ratio}


def shared(model: str, windows: str, folder: Path, repeats: int) -> dict[str, Any]:
    """One rank and two, each with one thread, in turns: seconds, the larger peak, and whether masks are equal."""
    from prune_callbacks import MaskSet

    runs: dict[str, Any] = {"1 rank": [], "2 ranks": []}
    for _ in range(repeats):
        for count, of_count in enumerate(runs.values(), 1):
            target = folder / f"{count}_ranks"
            shutil.rmtree(target, ignore_errors=True)
            of_count.append(measured("streaming", model, windows, str(target), ranks=count, OMP_NUM_THREADS="1"))
    masks = [MaskSet.load(folder / f"{count}_ranks/masks.safetensors") for count in (1, 2)]
    medians = {
        key: [statistics.median(run[key] for run in of_count) for of_count in runs.values()]
        for key in ("seconds", "peak_bytes")
    }
    ratios = {f"{key}_over_one_rank": round(two / one, 4) for key, (one, two) in medians.items()}
    return runs | ratios | {"same_masks": masks[0] == masks[1], "threads": 1}


def kills_of_ranks(count: int, model: str, windows: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Kills a random one of two ranks at a random moment, and makes each run again to its end."""
    few = folder / "few.safetensors"
    save_file({"calibration": load_file(windows)["calibration"][:4, :128].clone()}, few)
    whole, target = folder / "ranks_undisturbed", folder / "ranks_killed"

    def begin(where: Path) -> "list[subprocess.Popen[str]]":
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        }
        return [start("few windows", model, str(few), str(where), RANK=str(r), **address) for r in range(2)]

    def finish(where: Path) -> float:
        started = time.perf_counter()
        codes = [process.wait() for process in begin(where)]
        if any(codes):
            raise SystemExit(f"ranks failed with {codes}, which nobody had killed: nothing can be compared")
        return time.perf_counter() - started

    work = finish(whole)
    wanted, chance, runs = digest(whole), random.Random(seed), []
    while len(runs) < count:
        processes, victim = begin(target), chance.randrange(2)
        deadline = time.monotonic() + 60
        while not (target / "streaming/setting.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)  # imports are no work that could be lost
        time.sleep(chance.uniform(0, 0.8 * work))
        processes[victim].kill()
        codes = [process.wait(timeout=300) for process in processes]
        if codes[victim] not in (0, -signal.SIGKILL):
            raise SystemExit(f"a rank failed with {codes[victim]} by itself")
        if codes[victim] == -signal.SIGKILL:  # else it had ended before, and nothing was killed
            finished = len(list(target.glob("streaming/block_*.json")))
            finish(target)
            runs.append({"rank": victim, "finished_blocks": finished, "same_bytes": digest(target) == wanted})
            print(runs[-1], flush=True)
        shutil.rmtree(target, ignore_errors=True)
    same = sum(run["same_bytes"] for run in runs)
    return {"seconds_of_a_run": round(work, 1), "runs": runs, "same": same, "threads": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("windows", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--repeats", type=int, default=3, help="runs of either way")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="+", metavar="CELL")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/streaming_smollm2_135m.json")
    options = parser.parse_args()
    with safe_open(options.windows, framework="pt") as file:
        shape = file.get_slice("calibration").get_shape()
    setting = {
        "model": options.model or "SmolLM2-135M-Instruct",
        "pruner": "SparseGPT, 50 %",
        "windows": shape,
        "windows_per_batch": BATCH,
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }
    results = open_results(options.results, setting)
    model = str(options.model or smollm2_135m())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cells: dict[str, Callable[[], dict[str, Any]]] = {
            "imports alone": lambda: measured("imports alone"),
            "compared": lambda: compared(model, str(options.windows), folder, options.repeats),
            "reconstructed": lambda: reconstructed(model, str(options.windows), folder, options.repeats),
            "shared": lambda: shared(model, str(options.windows), folder, options.repeats),
            "kills": lambda: kills(options.kills, model, options.windows, folder),
            "kills of ranks": lambda: kills_of_ranks(options.kills, model, options.windows, folder),
        }
        for key in options.only or cells:
            if key not in results["cells"]:
                results["cells"][key] = {"threads": torch.get_num_threads()} | cells[key]()
                write_json(options.results, results)
    print_results(results["cells"])


def print_results(cells: dict[str, Any]) -> None:
    if "compared" in cells:
        cell = cells["compared"]
        print(f"peak memory, streaming over in memory: {cell['peak_over_in_memory']:.3f}; {cell['equality']}")
    if "reconstructed" in cells:
        print(f"peak memory, with reconstruction over without: {cells['reconstructed']['peak_over_streaming']:.3f}")
    if "shared" in cells:
        cell = cells["shared"]
        print(
            f"two ranks over one: seconds {cell['seconds_over_one_rank']:.3f}, peak of a rank "
            f"{cell['peak_bytes_over_one_rank']:.3f}, same masks: {cell['same_masks']}"
        )
    for key in ("kills", "kills of ranks"):
        if key in cells:
            print(f"{key}: {cells[key]['same']} of {len(cells[key]['runs'])} runs ended the same")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        # Not in the children: what they import is measured.
        from prune_callbacks.storage.cells import open_results
        from prune_callbacks.tasks import smollm2_135m
        from prune_callbacks.writing import write_json

        main()
