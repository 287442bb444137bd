"""Lightning callbacks: they decide when. What is done lies in the packages below."""

import lazy_loader

# Imported on first use: pruning does not import what draws reports.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
