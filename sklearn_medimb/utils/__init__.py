"""Tools for those who write or test estimators.

Imports `_machine`.
"""
