"""Whole-model generation on the GPU: a static key-value cache, decode steps captured in CUDA graphs, sampling on the device."""
