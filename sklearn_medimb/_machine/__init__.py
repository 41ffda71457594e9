"""The machine: devices, memory, threads, processes, random numbers."""
