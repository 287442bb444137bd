"""What becomes of a layer: the sequential loop, a solved block, permuted channels, iterative masks, the report."""
