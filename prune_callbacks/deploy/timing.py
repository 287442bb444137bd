"""The time of calls, taken in turns in one run."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """
    Seconds of a call: the median, and the 10th and 90th percentiles of the repeats.

    Attributes:
        peak_bytes: what the call held on the GPU beyond what was there before it, at most; None on a CPU.
    """

    median: float
    low: float
    high: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Failure:
    """A call that cannot be timed, and what it raised."""

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
    The time of every call, taken in turns: all once, then all again, so that a slow spell of the machine meets all.

    On a GPU between two CUDA events around the call, on a CPU by `time.perf_counter`. A call that raises is left out
    from there on and the others go on.

    Args:
        calls: by name.
        device: where they work.
        repeats: turns that count.
        warmup: calls of each before the first turn, at least one.
        prepare: called with the name before every call, outside of its time.

    Raises:
        ValueError: there is no turn or no warm-up.
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
            peaks[name] = attempt(name, _peak)  # the last one's: the first may compile
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
    low, high = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9]).double()).tolist()
    return Timing(statistics.median(seconds), low, high, peak)
