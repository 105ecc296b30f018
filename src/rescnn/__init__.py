"""The minimal multi-scale residual 1-D CNN; needs torch only."""

from rescnn.model import ResCNNBlock, ResCNNStack

__all__ = ["ResCNNBlock", "ResCNNStack"]
