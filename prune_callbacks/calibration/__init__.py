"""What reaches a layer: token windows, captured block inputs, streamed statistics, prefetched blocks."""
