"""Pruning and quantisation: formats, masks, their order, and folders of the announced size that load elsewhere."""
