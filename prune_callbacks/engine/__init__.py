"""The engine: prunes a model block by block, permutes its channels, raises masks, and reports the results."""
