"""Times several calls in turns in one run."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """
    The measured time and memory of a call.

    Attributes:
        median: median of the repeats, in seconds.
        low: 10th percentile, in seconds.
        high: 90th percentile, in seconds.
        peak_bytes: peak bytes that the call allocated on the GPU in addition to earlier ones; None on a CPU.
    """

    median: float
    low: float
    high: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Failure:
    """The error of a call that cannot be timed."""

    error: str


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int = 20,
    warmup: int = 3,
    prepare: Callable[[str], object] | None = None,
) -> dict[str, Timing | Failure]:
    """
    Times calls in turns, each once per turn, so that a slow phase of the machine affects all of them alike.

    On a GPU measures the time between two CUDA events around the call, on a CPU uses `time.perf_counter`. A call that
    raises is not repeated; the others continue.

    Args:
        calls: the calls by name.
        device: the device on which they run.
        repeats: measured turns, at least one.
        warmup: calls of each before the first turn, at least one.
        prepare: function that gets the name before every call; its time is not measured.

    Returns:
        the timing of every call, or its failure, by name.

    Raises:
        ValueError: `repeats` or `warmup` is less than 1.
    """
    if repeats < 1 or warmup < 1:
        raise ValueError(f"time_in_turns needs a repeat and a warm-up call, got repeats={repeats}, warmup={warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, int | None] = {}
    failures: dict[str, Failure] = {}

    def attempt(name: str, measure: Callable[[Callable[[], object], torch.device], Any]) -> Any:
        if name in failures:
            return None
        try:
            if prepare is not None:
                prepare(name)
            return measure(calls[name], device)
        except Exception as error:
            failures[name] = Failure(f"{type(error).__name__}: {str(error).strip()[:400]}")

    for name in calls:
        for _ in range(warmup):
            peaks[name] = attempt(name, _peak)  # keeps the peak of the last warm-up: the first may compile
    for _ in range(repeats):
        for name in calls:
            seconds[name].append(attempt(name, _seconds))
    return {name: failures[name] if name in failures else _timing(seconds[name], peaks[name]) for name in calls}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    stream = torch.cuda.current_stream(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _peak(call: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _timing(seconds: list[float], peak: int | None) -> Timing:
    parts = torch.tensor([0.1, 0.9], dtype=torch.float64, device="cpu")
    low, high = torch.tensor(seconds, dtype=torch.float64, device="cpu").quantile(parts).tolist()
    return Timing(statistics.median(seconds), low, high, peak)
