"""Block reconstruction: trains what is left of a pruned block until the block computes what it did when dense."""
