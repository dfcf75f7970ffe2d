"""The networks, their configs and checkpoints."""
