"""From the X of the caller to batches on the device: layouts, containers, pixel scale, rows, plans.

Imports `_machine`, `_pages`, `_parameters`, `augment`.
"""
