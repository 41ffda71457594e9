"""Training: the skorch net, its callbacks, checkpoints."""
