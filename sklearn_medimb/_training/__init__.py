"""Training with skorch: stages and their criteria, the net, callbacks, checkpoints.

Imports `_data`, `_machine`, `backbones`.
"""
