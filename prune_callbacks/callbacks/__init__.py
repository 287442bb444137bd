"""Lightning callbacks decide when to act; the packages that they import do the work."""

import lazy_loader

# Imported on first use: pruning does not import the packages that draw reports.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
