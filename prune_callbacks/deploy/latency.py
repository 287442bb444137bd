"""Times sparse and dense variants of layers and models, in turns in one run."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from prune_callbacks.deploy.csr import csr_bytes
from prune_callbacks.deploy.timing import Failure, Timing, time_in_turns

BASE = "dense"
"""Name of the variant with which the others are compared."""

CACHE_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""
Bytes written before a layer is timed. The write evicts the weights from the caches, as happens in a whole model. On a
GPU it also takes longer than the host needs to launch the layer, so that only the device's time is measured.
"""


def stored_bytes(module: nn.Module) -> int:
    """Returns the bytes of a module's parameters and buffers as stored: packed and CSR weights by their parts."""
    tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return sum(_bytes(t) for t in tensors.values())


def _bytes(tensor: Tensor) -> int:
    if tensor.layout is torch.sparse_csr:
        return csr_bytes(tensor)
    if is_traceable_wrapper_subclass(tensor):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def with_compiled(variants: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns the variants, each followed by its `torch.compile` version "NAME compiled"; the first call compiles."""
    both: dict[str, nn.Module] = {}
    for name, module in variants.items():
        both[name] = module
        both[f"{name} compiled"] = cast(nn.Module, torch.compile(module))
    return both


@torch.no_grad()
def layer_sweep(
    layers: Mapping[str, Mapping[str, nn.Module]], tokens: Sequence[int], *, repeats: int = 20, warmup: int = 3
) -> list[dict[str, Any]]:
    """
    Times variants of layers over the number of tokens in one call.

    In a decoding step, a layer gets one token per sequence of the batch. Weights are read from memory, not from the
    caches. On a GPU the device's time is measured, without the host's launch time, which `model_sweep` includes.

    Args:
        layers: layers by title and variant: linear layers or modules with `in_features`. Each title needs a variant
            "dense".
        tokens: numbers of tokens to measure.
        repeats: as for `time_in_turns`.
        warmup: as for `time_in_turns`.

    Returns:
        one record per title, number of tokens and variant: `title, phase ("layer"), batch (None), tokens, variant`,
        `median, low, high` (seconds), `tokens_per_second, speedup` (over "dense"; below 1 is slower),
        `weight_bytes, peak_bytes, error` (None unless the variant failed; the measurements are None if it did).

    Raises:
        ValueError: a title has no variant "dense".
    """
    cells: list[dict[str, Any]] = []
    for title, variants in layers.items():
        weight = _base(variants, f"layer {title}").get_parameter("weight")
        device, sized = weight.device, {name: (layer, _inputs(layer)) for name, layer in variants.items()}
        flush = torch.empty(CACHE_BYTES.get(device.type, 2**26), dtype=torch.uint8, device=device)
        written = partial(_write, flush)
        for count in tokens:
            drawn = {
                size: torch.randn(count, size, generator=torch.Generator().manual_seed(0)).to(device, weight.dtype)
                for _, size in sized.values()
            }
            calls = {name: partial(layer, drawn[size]) for name, (layer, size) in sized.items()}
            with _compiling(variants):
                measured = time_in_turns(calls, device, repeats=repeats, warmup=warmup, prepare=written)
            cells += _cells(variants, measured, title, "layer", None, count, rows=count)
    return cells


def _write(flush: Tensor, _: str) -> None:
    flush.zero_()


def _inputs(layer: nn.Module) -> int:
    layer = getattr(layer, "_orig_mod", layer)
    layer = getattr(layer, "_original", (layer,))[0]  # the layer that a `StandIn` replaces
    return int(layer.nx) if isinstance(layer, Conv1D) else int(layer.in_features)  # type: ignore[arg-type]


@torch.no_grad()
def model_sweep(
    models: Mapping[str, nn.Module],
    batches: Sequence[int],
    prompt_tokens: Sequence[int],
    *,
    title: str = "model",
    repeats: int = 20,
    warmup: int = 3,
) -> list[dict[str, Any]]:
    """
    Times variants of causal language models of `transformers`, separately for prefill and decode.

    Prefill is the forward pass over a batch of random prompts that fills a new cache. Decode is the forward pass over
    one further token per sequence. Every decoding step gets its own copy of the filled cache, made outside of the
    measured time, so that all repeats do the same work with any kind of cache. The host's launch time is included.

    Args:
        models: models by variant, in evaluation mode and on one device; one variant must be "dense".
        batches: numbers of sequences in a batch.
        prompt_tokens: lengths of the prompts.
        title: title of the records.
        repeats: as for `time_in_turns`.
        warmup: as for `time_in_turns`.

    Returns:
        records as in `layer_sweep`, with `phase` "prefill" or "decode", and the length of the prompts in `tokens`.

    Raises:
        ValueError: no variant is "dense".
    """
    weight = next(_base(models, title).parameters())
    vocabulary = models[BASE].config.get_text_config(decoder=True).vocab_size  # type: ignore[operator, union-attr]
    cells: list[dict[str, Any]] = []
    for batch in batches:
        for length in prompt_tokens:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(vocabulary, (batch, length), generator=generator).to(weight.device)
            for phase, calls_of, rows in ("prefill", _prefill, batch * length), ("decode", _decode, batch):
                calls, prepare = calls_of(models, ids)
                with _compiling(models):
                    measured = time_in_turns(calls, weight.device, repeats=repeats, warmup=warmup, prepare=prepare)
                cells += _cells(models, measured, title, phase, batch, length, rows)
    return cells


Calls = tuple[dict[str, Callable[[], object]], Callable[[str], object]]


def _prefill(models: Mapping[str, nn.Module], ids: Tensor) -> Calls:
    return {name: partial(model, ids, **_options(model)) for name, model in models.items()}, lambda _: _wait(ids)


def _decode(models: Mapping[str, nn.Module], ids: Tensor) -> Calls:
    filled: dict[str, Any] = {}
    current: dict[str, Any] = {}

    def prepare(name: str) -> None:
        if name not in filled:
            model = getattr(models[name], "_orig_mod", models[name])
            filled[name] = model(ids, **_options(model)).past_key_values
        current.clear()  # frees the previous copy: only one is held at a time
        current[name] = copy.deepcopy(filled[name])
        _wait(ids)

    def step(name: str, model: nn.Module) -> object:
        return model(ids[:, -1:], past_key_values=current[name], **_options(model))

    return {name: partial(step, name, model) for name, model in models.items()}, prepare


def _options(model: nn.Module) -> dict[str, Any]:
    accepted = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    return {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in accepted else {})


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _base(variants: Mapping[str, nn.Module], what: str) -> nn.Module:
    if BASE not in variants:
        raise ValueError(f"{what}: the variants {list(variants)} have none named {BASE!r} to compare with")
    return variants[BASE]


def _compiling(variants: Mapping[str, nn.Module]) -> AbstractContextManager[Any]:
    """Resets the compiler, so that each cell compiles for its own shapes; a graph that is not compiled raises."""
    from torch._dynamo import config as dynamo_config  # takes seconds to import: only when timing
    from torch._dynamo.eval_frame import OptimizedModule

    if any(isinstance(module, OptimizedModule) for module in variants.values()):
        torch.compiler.reset()
    return cast(AbstractContextManager[Any], dynamo_config.patch(fail_on_recompile_limit_hit=True))


def _cells(
    variants: Mapping[str, nn.Module],
    measured: Mapping[str, Timing | Failure],
    title: str,
    phase: str,
    batch: int | None,
    tokens: int,
    rows: int,
) -> list[dict[str, Any]]:
    base = measured[BASE]
    cells: list[dict[str, Any]] = []
    for name, timing in measured.items():
        cell: dict[str, Any] = {"title": title, "phase": phase, "batch": batch, "tokens": tokens, "variant": name}
        cell |= dict.fromkeys(("median", "low", "high", "tokens_per_second", "speedup", "peak_bytes", "error"))
        cell["weight_bytes"] = stored_bytes(variants[name])
        if isinstance(timing, Failure):
            cell |= asdict(timing)
        else:
            cell |= asdict(timing) | {"tokens_per_second": rows / timing.median}
            cell["speedup"] = base.median / timing.median if isinstance(base, Timing) else None
        cells.append(cell)
    return cells
