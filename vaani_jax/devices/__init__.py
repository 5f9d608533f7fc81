"""Devices: the mesh and its rules, processes, memory, what chips can do."""
