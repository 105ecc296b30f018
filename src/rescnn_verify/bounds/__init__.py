"""Bounds that are theorems: operator norms, gradient gains and round-off."""
