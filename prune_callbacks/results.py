"""The common base of result dataclasses."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast


class Result:
    """The base of dataclasses that functions return: typed fields, and plain values by `to_dict`."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values that JSON can represent; tensors and masks are left out."""
        found = {field.name: _plain(getattr(self, field.name)) for field in fields(cast(Any, self))}
        return {name: value for name, value in found.items() if value is not _LEFT_OUT}


_LEFT_OUT = object()


def _plain(value: Any) -> Any:
    """Returns a field as plain values; `_LEFT_OUT` for a tensor, a mask or another value that JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "packed"):  # a set of masks, which would be unpacked
        return _LEFT_OUT
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, Mapping):
        items = {str(name): _plain(item) for name, item in value.items()}
        return _LEFT_OUT if any(item is _LEFT_OUT for item in items.values()) else items
    if isinstance(value, list | tuple):
        parts = [_plain(item) for item in value]
        return _LEFT_OUT if any(part is _LEFT_OUT for part in parts) else parts
    return _LEFT_OUT
