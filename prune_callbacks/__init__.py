"""PyTorch Lightning callbacks that prune a language model and bring its quality back."""

import lazy_loader

# The public names are listed in __init__.pyi and imported on first use: a pattern does not import Lightning.
_imported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """Imports a public name on first use; the error for another name says which one is near."""
    if name in __all__ or name.startswith("_"):
        return _imported(name)
    import difflib

    near = difflib.get_close_matches(name, __all__, 1)
    raise AttributeError(f"prune_callbacks has no {name}" + (f"; did you mean {near[0]}?" if near else ""))
