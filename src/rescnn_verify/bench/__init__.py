"""Timing of models on a CPU or a CUDA device, honest about what was measured."""

#: How a model is run: as it is, by `torch.compile`, or replayed from a CUDA graph.
HOWS = ("eager", "compiled", "graph")
