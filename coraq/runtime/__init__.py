"""The machine: memory, processors, devices, safe files, the hub."""
