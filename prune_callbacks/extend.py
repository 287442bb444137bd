"""
Everything that an extension needs: Protocols, helpers and checks for pruners, patterns, schedules and strategies.

- Score: `Scored(pattern, score=..., statistic=..., pool=...)` makes a pruner of a function. If the score has settings,
  subclass `ScorePruner` as a frozen dataclass with the settings as fields. `RIA` (prune_callbacks.pruners.ria) is a
  template.
- Pruner that changes weights: implement `Pruner`; `as_pruned` makes its result. `prune_callbacks.pruners.questions`
  lists the optional attributes.
- Pattern: implement `Pattern`. `prune_callbacks.sparsity.questions` lists the optional attributes. `Strips` in
  tests/test_extend.py is a template.
- Schedule: implement `Schedule`. `Stairs` in tests/test_extend.py is a template.
- Allocation: implement `Allocation`.
- Strategy: call `register_strategy(Served(...))` before `Trainer.fit`, in every process. `Served.access` makes a
  `ParamAccess`, which describes the part of a parameter that a rank holds. `PlainAccess`
  (prune_callbacks.parallel.plain) suits strategies under which every rank holds whole parameters.

`check_contract(x)` tries a pruner, a pattern or a schedule on random numbers; call it in a test. Allocations and
`ParamAccess` have no such check.

Three features know single devices, DDP, FSDP2 and DeepSpeed only, and a registration does not extend them: snapshots
for `Rewind`, `consolidate`, and the gathering of sharded weights for `RunReport`.
"""

import lazy_loader

# Imported on first use: a score needs neither Lightning nor transformers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub("prune_callbacks", __file__)
