"""Influence: which training records, and whose, moved a model towards a target or away from it.

A score above 0 says that training on the record lowers the loss of the target.
"""
