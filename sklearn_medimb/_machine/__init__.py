"""The machine: devices, memory, threads, processes, random numbers.

Imports nothing of the package.
"""
