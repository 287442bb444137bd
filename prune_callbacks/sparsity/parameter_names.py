"""Finds the parameters of masks in a module that may contain the pruned model."""

from collections.abc import Collection, Mapping, Sequence


class Parameters:
    """
    The shapes of a module's parameters, by name, for finding the parameters of masks.

    A wrapper around a layer adds one part to the names of its parameters, the same for all layers that it wraps. So
    `up_proj.weight` is also found as `up_proj.NAME.weight`, and the other way round, if exactly one such parameter has
    the mask's shape.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._wrapped: dict[str, list[str]] = {}
        for name in self.shapes:
            self._wrapped.setdefault(unwrapped(name), []).append(name)

    def find(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Returns the name of the parameter of a mask, given the mask's name and shape; None if there is none."""
        if name in self.shapes:
            return name
        places = [*self._wrapped.get(name, ()), unwrapped(name)]
        fitting = [place for place in places if self.shapes.get(place) == shape]
        return fitting[0] if len(fitting) == 1 else None

    def find_all(self, masks: Mapping[str, tuple[int, ...]], prefix: str = "") -> dict[str, str]:
        """Returns the parameters' names by the masks' names, of the masks that have one and agree on the wrapper."""
        found = {name: self.find(prefix + name, shape) for name, shape in masks.items()}
        places = {name: place for name, place in found.items() if place is not None}
        wrappers = {name: _wrapper(prefix + name, place) for name, place in places.items()}
        used = set(wrappers.values()) - {""}
        return places if len(used) < 2 else {name: place for name, place in places.items() if not wrappers[name]}

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
        ends = {f".{first}", f".{unwrapped(first)}"}
        forms = dict.fromkeys(form for name in self.shapes for form in (name, unwrapped(name)))
        prefixes = dict.fromkeys(form[: -len(end) + 1] for form in forms for end in ends if form.endswith(end))
        fitting = [prefix for prefix in prefixes if len(self.find_all(masks, prefix)) == len(masks)]
        exact = [prefix for prefix in fitting if all(prefix + name in self.shapes for name in masks)]
        fitting = exact or fitting  # a wrapper's part in a name is only looked for where names are not those
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


def unwrapped(name: str) -> str:
    """Returns a parameter's name without the last part in front of its own: `a.b.weight` becomes `a.weight`."""
    owner, _, last = name.rpartition(".")
    outer = owner.rpartition(".")[0]
    return f"{outer}.{last}" if outer else last


def _wrapper(name: str, place: str) -> str:
    """Returns the part of the name that a wrapper has added to a parameter, or to a mask; empty: none."""
    if name == place:
        return ""
    return max(name, place, key=len).split(".")[-2]
