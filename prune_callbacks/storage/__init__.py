"""How things are written and read: run records, run folders, model folders, training checkpoints."""
