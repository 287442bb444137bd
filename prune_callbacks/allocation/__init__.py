"""Allocates sparsity to layers: rules, their measurements, and counts that are exact to one weight."""
