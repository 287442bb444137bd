"""Lets a causal LM write further calibration windows itself."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, zip_longest
from typing import Any

import torch
from jaxtyping import Int
from rich.progress import Progress
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

from prune_callbacks.calibration.batches import Batch, device_of, named_inputs
from prune_callbacks.calibration.sources import evaluating
from prune_callbacks.calibration.texts import language_model, moved, texts_of
from prune_callbacks.ranks import ALONE, Ranks


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
    generation settings are not used. After an end of text the model writes on. Windows are as long as
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
    whole = language_model("write_windows", model)
    given = ranks.attempt(lambda: [texts_of("write_windows", whole, named_inputs(batch)) for batch in batches])
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
        with Progress(disable=not show) as bar, _writing(whole, device):
            task = bar.add_task(f"writing {count} windows", total=len(mine) * (tokens - prompt_tokens))
            step = _Step(lambda: bar.advance(task))
            return {n: _written(whole, wanted[n], tokens, seed + n, step) for n in mine}

    parts = dict(chain.from_iterable(part.items() for part in ranks.gather(ranks.attempt(write))))
    return torch.cat([parts[number] for number in range(len(wanted))])


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
    settings = model.generation_config
    try:
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            stack.enter_context(moved(model, device))
            stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))  # all are seeded
            yield
    finally:
        model.generation_config = settings


@torch.no_grad()
def _written(model: PreTrainedModel, prompts: Tensor, tokens: int, seed: int, step: StoppingCriteria) -> Tensor:
    """Continues prompts to windows."""
    torch.manual_seed(seed)
    ids = prompts.to(device_of(model))
    generate: Any = model.generate
    drawn: Tensor = generate(
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
