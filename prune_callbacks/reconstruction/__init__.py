"""Block reconstruction: trains the kept weights of a pruned block to give the outputs of the dense model's block."""
