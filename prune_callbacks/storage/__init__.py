"""Writes and reads run records, run folders, model folders and training checkpoints."""
