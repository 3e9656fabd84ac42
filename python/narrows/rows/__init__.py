"""Rows of data in memory: what kind of array they are, on which device, and how they are read ahead."""
