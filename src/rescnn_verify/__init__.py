"""Property-based verification of residual 1-D CNNs.

The public names are loaded on first use, so that importing the package (as the pytest plugin does)
does not import torch.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "BlockHandles": "rescnn_verify.handles",
    "Case": "rescnn_verify.case",
    "Choice": "rescnn_verify.space",
    "Config": "rescnn_verify.case",
    "Constraint": "rescnn_verify.space",
    "ConvNorm": "rescnn_verify.handles",
    "Floats": "rescnn_verify.space",
    "Integers": "rescnn_verify.space",
    "Lists": "rescnn_verify.space",
    "Space": "rescnn_verify.space",
    "Target": "rescnn_verify.target",
    "Traits": "rescnn_verify.target",
    "contract_handles": "rescnn_verify.finding",
    "conv_norm_bound": "rescnn_verify.bounds.norms",
    "error_bound": "rescnn_verify.bounds.rounding",
    "lipschitz_bound": "rescnn_verify.bounds.gains",
}
__all__ = [*_PUBLIC, "__version__"]

# The wheel holds the statements as `rescnn_verify.properties`; in a checkout the one copy lies in
# the top-level folder `properties`, which this makes importable under the same name.
_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "properties" / "__init__.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
