"""The inputs of layers: token windows, captured block inputs, streamed statistics, prefetched blocks."""
