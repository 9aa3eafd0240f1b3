"""Kernels as the registry sees them, one file each; a new file in this folder is found by itself."""
