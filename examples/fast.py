"""Faster forms of the bundled stack, to compare with it.

``rescnn-verify check examples/fast.py:fold --against rescnn:ResCNNStack``
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rescnn import ResCNNStack


def fold(model: nn.Module) -> nn.Module:
    """The model, in eval mode, with every batch norm folded into the convolution before it."""
    for part in list(model.modules()):
        if isinstance(part, nn.Sequential):
            for i in range(len(part) - 1):
                if isinstance(part[i], nn.Conv1d) and isinstance(part[i + 1], nn.BatchNorm1d):
                    part[i], part[i + 1] = fuse_conv_bn_eval(part[i], part[i + 1]), nn.Identity()
    return model


def fold_without_eps(model: nn.Module) -> nn.Module:
    """The same with a mistake: it forgets what a norm adds to its variance."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.eps = 0.0
    return fold(model)


class Merged(ResCNNStack):
    """One convolution instead of one for each branch, its kernels padded to the widest."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            convs = [branch[0] for branch in block.branches]
            widest = max(conv.kernel_size[0] for conv in convs)
            sides = [(widest - conv.kernel_size[0]) // 2 for conv in convs]
            weight = [F.pad(c.weight, (s, s)) for c, s in zip(convs, sides, strict=True)]
            bias = torch.cat([conv.bias for conv in convs])
            merged = F.conv1d(x, torch.cat(weight), bias, padding=widest // 2)
            parts = merged.split([conv.out_channels for conv in convs], dim=1)
            active = [branch[1:](part) for branch, part in zip(block.branches, parts, strict=True)]
            x = F.relu(x + block.fusion(torch.cat(active, dim=1)))
        return x
