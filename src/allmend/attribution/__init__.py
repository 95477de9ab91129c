"""Influence from end to end: of a model and an adapter made elsewhere."""
