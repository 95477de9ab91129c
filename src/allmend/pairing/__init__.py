"""From a model and a text to what its depth costs, and to the folder of a model with fewer steps."""
