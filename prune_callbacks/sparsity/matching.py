"""Finds the parameter that a mask is for, in a module that may contain the model that was pruned."""

from collections.abc import Collection, Mapping, Sequence


class Parameters:
    """
    The parameters of a module, by name, to look masks up in.

    A layer may have been wrapped, and the wrapper hold it under a further name: `up_proj.weight` is then found as
    `up_proj.NAME.weight`, and the other way round, if exactly one such parameter has the mask's shape.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._wrapped: dict[str, list[str]] = {}
        for name in self.shapes:
            owner, _, last = name.rpartition(".")
            self._wrapped.setdefault(f"{owner.rpartition('.')[0]}.{last}", []).append(name)

    def find(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Returns the name of a mask's parameter, or None."""
        if name in self.shapes:
            return name
        owner, _, last = name.rpartition(".")
        places = [*self._wrapped.get(name, ()), f"{owner.rpartition('.')[0]}.{last}"]
        fitting = [place for place in places if self.shapes.get(place) == shape]
        return fitting[0] if len(fitting) == 1 else None

    def prefix(self, masks: Mapping[str, tuple[int, ...]], trained: Collection[str]) -> str:
        """
        Returns what precedes the masks' names in the parameters' names; of several models, the only trained one's.

        Args:
            masks: the shapes of the masks, by name.
            trained: the names of the parameters that are trained.

        Raises:
            ValueError: the masks fit several models, and not exactly one is trained.
        """
        first, shape = next(iter(masks.items()), ("", ()))
        if not first or self.find(first, shape) is not None:
            return ""
        owner, _, last = first.rpartition(".")
        ends = [name.partition(f".{owner}.") for name in self.shapes if name.rpartition(".")[2] == last]
        prefixes = [f"{before}." for before in dict.fromkeys(before for before, dot, _ in ends if dot)]
        fitting = [p for p in prefixes if all(self.find(p + name, s) is not None for name, s in masks.items())]
        if len(fitting) < 2:
            return next(iter(fitting), "")
        learning = [prefix for prefix in fitting if any(name.startswith(prefix) for name in trained)]
        if len(learning) != 1:
            raise ValueError(
                f"these masks fit {len(fitting)} models, {[prefix.rstrip('.') for prefix in fitting]}, of which "
                f"{len(learning)} are trained; one must be: freeze the others (requires_grad_(False)), or give the "
                "parameters of the one that is meant"
            )
        return learning[0]
