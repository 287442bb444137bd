"""PyTorch Lightning callbacks that prune a language model and bring its quality back."""

import lazy_loader

# The public names are listed in __init__.pyi and imported on first use: a pattern does not import Lightning.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
