"""What sparse layers and models are worth in seconds: variants of the same work, timed in turns in one run."""

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
"""The variant that the others are compared with."""

CACHE_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""
What is written before a layer is timed. It takes the weights out of the caches, where a layer finds them in no model.
On a GPU it also lasts longer than the host needs to launch the layer, so that the device's own time is measured.
"""


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers as they are stored: packed and CSR weights by their parts."""
    tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return sum(_bytes(t) for t in tensors.values())


def _bytes(tensor: Tensor) -> int:
    if tensor.layout is torch.sparse_csr:
        return csr_bytes(tensor)
    if is_traceable_wrapper_subclass(tensor):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def with_compiled(variants: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The variants, and behind each the same under `torch.compile`, named "... compiled"; nothing is compiled yet."""
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
    The time of layers, variant by variant, over the number of tokens that they get at once.

    A decoding step of a batch gives a layer as many tokens as the batch has sequences. Weights come from memory, not
    from the caches; on a GPU it is the device's time, without the host's to launch, which `model_sweep` has.

    Args:
        layers: by title and variant; of each title one must be "dense". Linear layers or modules with `in_features`.
        tokens: how many, one cell each.
        repeats: as for `time_in_turns`.
        warmup: as for `time_in_turns`.

    Returns:
        One record a title, number of tokens and variant: `title, phase ("layer"), batch (None), tokens, variant`,
        `median, low, high` (seconds), `tokens_per_second, speedup` (over "dense": below 1 it is slower),
        `weight_bytes, peak_bytes, error` (then the measurements are None).
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
    layer = getattr(layer, "_original", (layer,))[0]  # of a `StandIn`
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
    The time of causal language models of `transformers`, variant by variant: prefill and decode apart.

    Prefill is the forward pass over a batch of prompts, of random tokens, that fills a new cache; decode is the one
    over a single further token each. Every decoding step gets its own copy of the filled cache, made outside of its
    time, so all repeats do the same work, whatever kind of cache the model has. The host's time to launch counts.

    Args:
        models: by variant; one must be "dense". In evaluation mode, on one device.
        batches: numbers of sequences.
        prompt_tokens: lengths of the prompts.
        title: for the records.
        repeats: as for `time_in_turns`.
        warmup: as for `time_in_turns`.

    Returns:
        Records as of `layer_sweep`, with `phase` "prefill" or "decode", and in `tokens` the length of the prompts.
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
        current.clear()  # one copy at a time
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
    """Every cell is compiled for its own shapes; and a graph that gives up compiling fails, not runs eagerly unseen."""
    from torch._dynamo import config as dynamo_config  # seconds, which a model that is never timed need not pay
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
