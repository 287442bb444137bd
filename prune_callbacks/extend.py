"""
Everything that an extension needs: Protocols, helpers and checks for pruners, patterns, schedules and strategies.

- A score makes a pruner: `Scored(pattern, score=..., statistic=..., pool=...)`.
- A pruner that changes weights implements `Pruner`; `as_pruned` makes its result. `prune_callbacks.pruners.questions`
  lists what it may say about itself besides.
- A pattern implements `Pattern`; `prune_callbacks.sparsity.questions` lists what it may say about itself besides.
- A schedule implements `Schedule`, an allocation `Allocation`.
- `check_contract(x)` tries any of these on drawn numbers: call it in a test.
- A strategy is served once `register_strategy(Served(...))` was called, with a `ParamAccess` that says what a rank
  holds.
"""

import lazy_loader

# Imported on first use: a score needs neither Lightning nor transformers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub("prune_callbacks", __file__)
