"""Finds the parameters of masks in a module that may contain the pruned model."""

from collections.abc import Collection, Mapping, Sequence


class Parameters:
    """
    The shapes of a module's parameters, by name, for finding the parameters of masks.

    A wrapper around a layer adds one part to the names of its parameters. So `up_proj.weight` is also found as
    `up_proj.NAME.weight`, and the other way round, if exactly one such parameter has the mask's shape.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._wrapped: dict[str, list[str]] = {}
        for name in self.shapes:
            owner, _, last = name.rpartition(".")
            self._wrapped.setdefault(f"{owner.rpartition('.')[0]}.{last}", []).append(name)

    def find(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Returns the name of the parameter of a mask, given the mask's name and shape; None if there is none."""
        if name in self.shapes:
            return name
        owner, _, last = name.rpartition(".")
        places = [*self._wrapped.get(name, ()), f"{owner.rpartition('.')[0]}.{last}"]
        fitting = [place for place in places if self.shapes.get(place) == shape]
        return fitting[0] if len(fitting) == 1 else None

    def prefix(self, masks: Mapping[str, tuple[int, ...]], trained: Collection[str]) -> str:
        """
        Returns the prefix that the parameters' names have in front of the masks' names.

        If the masks fit several models, it is the prefix of the only trained one.

        Args:
            masks: the shapes of the masks, by name.
            trained: the names of the trained parameters.

        Raises:
            ValueError: the masks fit several models, of which not exactly one is trained.
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
                f"{len(learning)} are trained; one must be: freeze the others (requires_grad_(False)), or pass the "
                "parameters of one model only"
            )
        return learning[0]
