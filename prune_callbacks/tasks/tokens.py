"""What a tokenizer does to a text, besides cutting it into tokens."""

from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the token ids of a text, without special tokens; raises ValueError if the tokenizer has no vocabulary."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids and text.strip():
        raise ValueError(
            f"the tokenizer of {name_of(tokenizer)} makes no token of text: its files are missing or do not fit. Name "
            "another folder (model.tokenizer.pretrained_model_name_or_path= on the command line)"
        )
    return ids


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a tokenizer, asked for special tokens, begins a text with BOS."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(tokenizer("text", add_special_tokens=True)["input_ids"][:1]) == [bos]


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the folder or the Hub's name that a tokenizer was loaded from, else its class name."""
    return tokenizer.name_or_path or type(tokenizer).__name__
