"""The parts of a model: its decoder blocks, the matrices to prune, experts, coupled layers, configurations."""
