"""Oracles: the reference architecture computed independently, in NumPy."""
