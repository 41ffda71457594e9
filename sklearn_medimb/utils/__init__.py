"""Tools for those who write or test estimators."""
