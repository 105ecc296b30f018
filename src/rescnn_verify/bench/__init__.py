"""Timing of models on a CPU or a CUDA device, honest about what was measured."""
