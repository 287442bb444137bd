"""Token windows of fixed length, cut from documents."""

import re
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

Encode = Callable[[str], list[int]]
MARGIN = 1024
"""Tokens between the last used one and a cut in the text; a cut changes only tokens of the same word or line."""
_SPACE = re.compile(r"\s")


def random_windows(
    documents: Sequence[str], encode: Encode, count: int, length: int, seed: int = 0
) -> Int[Tensor, "count length"]:
    """
    Draws `count` windows at random, without overlaps.

    This is the papers' calibration protocol (SparseGPT, Wanda: 128 windows of 2048 tokens of C4): a random document
    that is long enough gives one window at a random position. If there are too few long documents, documents give
    further windows.

    Args:
        documents: texts.
        encode: tokenizes one text, without special tokens.
        count: the number of windows.
        length: tokens per window.
        seed: seed of the random choices.

    Raises:
        ValueError: the documents hold fewer than `count` windows.
    """
    generator = torch.Generator().manual_seed(seed)
    first, further, lengths = [], [], []
    for index in torch.randperm(len(documents), generator=generator).tolist():
        ids = torch.tensor(encode(documents[index]), dtype=torch.long)
        lengths.append(len(ids))
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
        joined = (sum(lengths) + (len(lengths) - 1) * len(encode("\n\n"))) // length
        rows = f", or join the rows: with join_rows=True they fill about {joined}" if joined > len(chosen) else ""
        raise ValueError(
            f"asked for {count} calibration windows of {length} tokens; the corpus ({len(documents)} documents, the "
            f"longest of {max(lengths, default=0)} tokens) holds {len(chosen)}. Ask for fewer or shorter windows, or "
            f"give more text{rows}"
        )
    return torch.stack(chosen)


def joined_windows(
    documents: Sequence[str], encode: Encode, count: int, length: int, seed: int = 0
) -> Int[Tensor, "count length"]:
    """
    Draws `count` windows from documents that are too short to fill one each.

    Equivalent to `contiguous_windows` of the documents in a random order: they are joined with blank lines, and the
    windows do not overlap.

    Args:
        documents: texts.
        encode: tokenizes one text, without special tokens.
        count: the number of windows.
        length: tokens per window.
        seed: seed of the order.

    Raises:
        ValueError: the documents together do not fill `count` windows.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    return contiguous_windows([documents[index] for index in order], encode, length, limit=count)


def contiguous_windows(
    documents: Sequence[str], encode: Encode, length: int, limit: int | None = None
) -> Int[Tensor, "count length"]:
    """
    Joins all documents with blank lines, tokenizes them as one text and cuts it into windows; drops the remainder.

    This is the papers' evaluation protocol (the WikiText-2 test rows joined with blank lines). With a `limit`, only the
    beginning of the text is tokenized. It ends at white space at least `MARGIN` tokens after the last window, so that
    the cut changes no token of a window.

    Args:
        documents: texts, in order.
        encode: tokenizes one text, without special tokens.
        length: tokens per window.
        limit: the number of windows, taken from the beginning; None: all.

    Raises:
        ValueError: the text does not fill one window, or not `limit` windows.
    """
    text = "\n\n".join(documents)
    ids = torch.tensor(encode(text) if limit is None else _first_tokens(text, encode, limit * length), dtype=torch.long)
    available = len(ids) // length
    if available < (limit or 1):
        raise ValueError(
            f"the text has {len(ids)} tokens and fills {available} windows of {length}; {limit or 1} are needed. "
            "Ask for fewer or shorter windows, or give more text"
        )
    count = available if limit is None else limit
    return ids[: count * length].view(count, length)


def _first_tokens(text: str, encode: Encode, count: int) -> list[int]:
    """Tokenizes ever longer beginnings of a text until one has `count` tokens and a margin."""
    wanted = count + MARGIN
    size = wanted  # in characters; first guess: one per token
    while True:
        cut = _SPACE.search(text, size)
        ids = encode(text if cut is None else text[: cut.start()])
        if cut is None or len(ids) >= wanted:
            return ids
        size = max(2 * size, size * wanted * 11 // (10 * max(1, len(ids))))
