"""A run among organisations: the coordinator's process and each member's, over the engine between machines."""
