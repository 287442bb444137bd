"""Lets a causal LM write further calibration windows itself."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Any

import torch
from jaxtyping import Int
from rich.progress import Progress
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

from prune_callbacks.anatomy.blocks import find_language_model, is_sequence_to_sequence
from prune_callbacks.calibration.batches import Batch, accepted_inputs, device_of, named_inputs, real_tokens
from prune_callbacks.calibration.checks import check_batch
from prune_callbacks.calibration.sources import evaluating
from prune_callbacks.ranks import ALONE, Ranks

TEXT_KEYS = frozenset({"input_ids", "attention_mask", "position_ids", "cache_position", "use_cache"})
"""Inputs of a batch that holds nothing but text."""


def write_windows(
    model: nn.Module,
    batches: Iterable[Batch],
    count: int,
    *,
    prompt_tokens: int = 16,
    batch_size: int = 16,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> Int[Tensor, "count tokens"]:
    """
    Draws token windows from a causal LM's own distribution, to calibrate on beside the given ones.

    Every window begins with the first tokens of a given window, in their order, from the first again after the last.
    The rest is drawn from the model's probabilities as they are: temperature 1, nothing cut off, and the model's own
    generation settings are not used. An end of text may be drawn, and text goes on behind it. Windows are as long as
    the longest given one. Equivalent to `model.generate(prompts, do_sample=True, top_k=0)` without an end.

    Call it on the dense model, before it is pruned. Source: self-calibration (Williams, Chrysostomou and Aletras,
    NAACL 2025), which uses no given text at all.

    Args:
        model: a causal LM of `transformers`, or a module that holds one.
        batches: token ids (batch, tokens), or mappings with `input_ids` and maybe `attention_mask`.
        count: how many windows to write.
        prompt_tokens: how many tokens of a given window a written one begins with.
        batch_size: how many windows are written at once; the memory holds their keys and values.
        seed: of the drawn tokens. The random state is restored afterwards.
        device: where the whole model is moved to while it writes; None: where it is.
        progress: show a progress bar.
        ranks: processes that share the writing, each with the same model and with its own batches. All get all windows,
            the same as one process whose batches were dealt to them in turns.

    Returns:
        token ids (count, tokens), on the CPU.

    Raises:
        ValueError: the model does not generate text from token ids, the batches hold something else than token ids, or
            no given window has more than `prompt_tokens` real tokens.
    """
    for name, value in (("count", count), ("prompt_tokens", prompt_tokens), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"write_windows: {name} must be a whole number of at least 1, got {value!r}")
    language_model = writer("write_windows", model)
    given = ranks.attempt(lambda: [_texts(language_model, named_inputs(batch)) for batch in batches])
    dealt = zip_longest(*ranks.gather(given), fillvalue=())
    texts: list[Tensor] = [text for turn in dealt for batch in turn for text in batch]
    prompts = [text[:prompt_tokens] for text in texts if len(text) > prompt_tokens]
    if not prompts:
        raise ValueError(
            f"write_windows: no calibration window has more than prompt_tokens={prompt_tokens} tokens; the longest of "
            f"{len(texts)} has {max(map(len, texts), default=0)}"
        )
    wanted = torch.stack([prompts[number % len(prompts)] for number in range(count)]).split(batch_size)
    mine = range(ranks.rank, len(wanted), ranks.size)
    tokens = max(map(len, texts))

    def write() -> dict[int, Tensor]:
        show = progress and ranks.rank == 0
        with Progress(disable=not show) as bar, _writing(language_model, device):
            task = bar.add_task(f"writing {count} windows", total=len(mine) * (tokens - prompt_tokens))
            step = _Step(lambda: bar.advance(task))
            return {n: _written(language_model, wanted[n], tokens, seed + n, step) for n in mine}

    parts = dict(chain.from_iterable(part.items() for part in ranks.gather(ranks.attempt(write))))
    return torch.cat([parts[number] for number in range(len(wanted))])


def writer(who: str, model: nn.Module) -> PreTrainedModel:
    """Returns the causal LM in a module; raises ValueError, naming who asks, if it writes no text from token ids."""
    found = find_language_model(getattr(model, "_orig_mod", model))
    if not isinstance(found, PreTrainedModel) or not found.can_generate() or is_sequence_to_sequence(found):
        raise ValueError(
            f"{who}: {type(found).__name__} cannot write windows; that takes a causal LM of transformers, whose "
            "generate() continues token ids"
        )
    return found


def _texts(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """Returns the real tokens of every window of a batch."""
    check_batch(model, batch)
    inputs = accepted_inputs(model, batch)
    if "input_ids" not in inputs or not inputs.keys() <= TEXT_KEYS:
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"write_windows continues text, so batches must hold token ids alone; this one holds {found}")
    ids, real = inputs["input_ids"].cpu().long(), real_tokens(batch)
    return list(ids) if real is None else [row[keep] for row, keep in zip(ids, real.cpu(), strict=True)]


class _Step(StoppingCriteria):
    """Advances a bar with every token, and never stops."""

    def __init__(self, advance: Any) -> None:
        self._advance = advance

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self._advance()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _writing(model: PreTrainedModel, device: torch.device | str | None) -> Iterator[None]:
    """Moves a model to the device, in evaluation mode, without the generation settings of its own."""
    before, settings = device_of(model), model.generation_config
    there = before if device is None else torch.device(device)
    try:
        model.to(there)
        model.generation_config = GenerationConfig()
        with evaluating(model), torch.random.fork_rng([there] if there.type == "cuda" else []):
            yield
    finally:
        model.generation_config = settings
        model.to(before)


@torch.no_grad()
def _written(model: PreTrainedModel, prompts: Tensor, tokens: int, seed: int, step: StoppingCriteria) -> Tensor:
    """Continues prompts to windows."""
    torch.manual_seed(seed)
    ids = prompts.to(device_of(model))
    drawn = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens - ids.shape[1],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        stopping_criteria=[step],
    )
    return drawn.cpu()
