"""What a row of a corpus may hold: a text, or a chat of which the tokenizer's template makes a text."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from prune_callbacks.tasks.tokens import name_of


@dataclass(frozen=True)
class Chat:
    """
    A document that is a list of messages, which need a tokenizer to become a text.

    Args:
        messages: mappings with `role` and `content`, in order.
        place: the file or dataset and the row, for errors.
    """

    messages: Sequence[Mapping[str, Any]]
    place: str

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """
        Returns the chat as the tokenizer's chat template writes it.

        Raises:
            ValueError: the tokenizer has no template, the template refuses the chat or has no place for its tool
                calls, or a message has no text.
        """
        from jinja2 import TemplateError  # takes a moment to import, and most corpora hold no chats

        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"{self.place} holds a chat, and the tokenizer of {name_of(tokenizer)} has "
                "no chat template that makes a text of it. Set tokenizer.chat_template, or give texts"
            )
        messages = [_message(m, f"{self.place}: message {n}") for n, m in enumerate(self.messages, 1)]
        try:
            if any(m.get("tool_calls") for m in messages) and "tool_calls" not in tokenizer.get_chat_template():
                raise ValueError("it has no place for tool calls")
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"{self.place}: the tokenizer's chat template refuses this chat: {error}") from error


def read_row(row: Mapping[str, Any], field: str, place: str, kind: str) -> str | Chat:
    """
    Returns the text or the chat in a row.

    Args:
        row: values by key.
        field: the key of the text.
        place: the file or dataset and the row, for errors.
        kind: what a row should be, for errors.

    Raises:
        ValueError: the row has no such key, or its value is neither a text nor a list of messages.
    """
    value = row.get(field)
    if value is None:
        lacks = f"holds None (null) in its {field!r} field" if field in row else f"is no {kind} with a {field!r} field"
        raise ValueError(f"{place} {lacks}; {_others(row)}")
    if _is_chat(value):
        return Chat(value, place)
    if not isinstance(value, str):
        raise ValueError(
            f"{place} holds {found(value)} in its {field!r} field; accepted are a text, and a list of messages with "
            "role and content. Leave the row out, or name another field"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # which JSON can write as an escape, and no tokenizer reads
        raise ValueError(f"{place} holds half of a character (a lone surrogate) in its {field!r} field") from error
    return value


def as_text(document: Any, tokenizer: PreTrainedTokenizerBase, place: str) -> str:
    """Returns a document as a text; raises ValueError, which begins with `place`, if it is none."""
    if isinstance(document, Chat):
        return document.text(tokenizer)
    if not isinstance(document, str):
        raise ValueError(f"{place} is {found(document)}, and no text")
    return document


def found(value: Any) -> str:
    """Describes a value that is no text in a few words."""
    return "None (null)" if value is None else f"{reprlib.repr(value)} ({type(value).__name__})"


def _others(row: Mapping[str, Any]) -> str:
    """Says which keys of a row hold something, and how to read a chat in one of them."""
    given = [key for key, value in row.items() if value is not None]
    chat = next((key for key in given if _is_chat(row[key])), None)
    hint = "Leave the row out, or name one with field=" if chat is None else f'field="{chat}" reads the chat in it'
    return f"its keys are {', '.join(given)}. {hint}" if given else "no other key holds a value. Leave the row out"


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns a message whose content is one text; without keys of None, with which `datasets` fills up messages."""
    given = {key: value for key, value in message.items() if value is not None}
    content = given.get("content", "" if given.get("tool_calls") else None)
    if isinstance(content, list):  # in parts
        texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        if len(texts) < len(content):
            raise ValueError(f"{place} has parts that are no text: {found(content)}")
        content = "".join(texts)
    if not isinstance(content, str) or not isinstance(given.get("role"), str):
        raise ValueError(f"{place} needs a role and a content that are texts, and is {found(dict(message))}")
    return given | {"content": content}
