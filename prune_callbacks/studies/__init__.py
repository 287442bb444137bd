"""Measures the effect of pruning on a model, one change at a time."""

import lazy_loader

# Imported on first use: MeasuredAllocation does not import the packages that draw reports.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
