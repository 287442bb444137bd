"""Token windows of fixed length, cut from documents."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

Encode = Callable[[str], list[int]]


def random_windows(
    documents: Sequence[str], encode: Encode, count: int, length: int, seed: int = 0
) -> Int[Tensor, "count length"]:
    """
    `count` windows drawn at random, none overlapping another.

    The papers' calibration protocol (SparseGPT, Wanda: 128 windows of 2048 tokens of C4): a random document that
    is long enough gives one window at a random place. Where there are too few long documents, documents give
    further windows, none overlapping.

    Raises:
        ValueError: the documents hold fewer windows than asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    first, further, longest = [], [], 0
    for index in torch.randperm(len(documents), generator=generator).tolist():
        ids = torch.tensor(encode(documents[index]), dtype=torch.long)
        longest = max(longest, len(ids))
        if len(ids) < length:
            continue
        start = int(torch.randint(len(ids) % length + 1, (), generator=generator))
        windows = list(ids[start : start + (len(ids) - start) // length * length].split(length))
        first.append(windows.pop(int(torch.randint(len(windows), (), generator=generator))))
        further += windows
        if len(first) == count:
            break
    order = torch.randperm(len(further), generator=generator).tolist()
    chosen = first + [further[i] for i in order[: count - len(first)]]
    if len(chosen) < count:
        raise ValueError(
            f"asked for {count} calibration windows of {length} tokens; the corpus ({len(documents)} documents, the "
            f"longest of {longest} tokens) holds {len(chosen)}. Ask for fewer or shorter windows, or give more text"
        )
    return torch.stack(chosen)


def contiguous_windows(
    documents: Sequence[str], encode: Encode, length: int, limit: int | None = None
) -> Int[Tensor, "count length"]:
    """
    All documents joined with blank lines, tokenized as one text and cut into windows; the rest is dropped.

    The papers' evaluation protocol (the WikiText-2 test rows joined with blank lines).

    Args:
        documents: texts, in order.
        encode: tokenizes one text, without special tokens.
        length: tokens per window.
        limit: take only the first so many windows.

    Raises:
        ValueError: the text does not fill one window, or not `limit` windows.
    """
    ids = torch.tensor(encode("\n\n".join(documents)), dtype=torch.long)
    available = len(ids) // length
    if available < (limit or 1):
        raise ValueError(
            f"the text has {len(ids)} tokens and fills {available} windows of {length}; {limit or 1} are needed. "
            "Ask for fewer or shorter windows, or give more text"
        )
    count = available if limit is None else limit
    return ids[: count * length].view(count, length)
