"""What a model consists of: its decoder blocks, the matrices to prune, experts, coupled layers, configurations."""
