"""The statements, one module per family; the reader's first stop.

Each property is a generator function of a subject (the target, ready to build and run) and a case.
It yields every comparison it makes. Its docstring says what holds, why, and under which conditions.
"""

FAMILIES = (
    "split",
    "structure",
    "shape",
    "receptive_field",
    "residual",
    "side_effects",
    "rejection",
    "arithmetic",
    "relations",
    "locality",
    "gradients",
    "modes",
    "dropout",
    "state",
    "rounding",
    "transforms",
    "devices",
    "against",
)
