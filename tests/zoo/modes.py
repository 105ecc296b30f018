"""Training, evaluation and the running statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .base import Block, Stack, affine, batch_norm, update_statistics
from .registry import wrong


def functional(norm, x, **changes):
    """`F.batch_norm` on the module's tensors, with the count left alone."""
    arguments = dict(
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        weight=norm.weight,
        bias=norm.bias,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
    )
    return F.batch_norm(x, **(arguments | changes))


@wrong("modes", "momentum is taken for the share of the old statistics")
class MomentumReversed(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            return batch_norm(norm, x, momentum=1 - norm.momentum)


@wrong("modes", "the running statistics are a plain average over all batches")
class CumulativeAverage(Stack):
    class Block(Block):
        def make_norm(self, width):
            return nn.BatchNorm1d(width, momentum=None)


@wrong("modes", "training normalises by the unbiased variance")
class UnbiasedNormalisation(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            return batch_norm(norm, x, unbiased=True)


@wrong("modes", "the running variance collects the biased variance")
class BiasedRunningVariance(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if not norm.training:
                return norm(x)
            before, count = norm.running_var.clone(), x.shape[0] * x.shape[2]
            y = norm(x)
            with torch.no_grad():
                step = norm.running_var - before * (1 - norm.momentum)
                norm.running_var.sub_(step / count)
            return y


@wrong("modes", "eval mode goes on updating the running statistics")
class EvalUpdates(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            y = norm(x)
            if not norm.training and x.shape[0] * x.shape[2] > 1:
                functional(norm, x.detach(), training=True)
            return y


@wrong("modes", "eval mode normalises by the batch")
class EvalUsesBatch(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.training or x.shape[0] * x.shape[2] < 2:
                return norm(x)
            return functional(norm, x, training=True, running_mean=None, running_var=None)


@wrong("modes", "no running statistics are kept")
class NoRunningStatistics(Stack):
    class Block(Block):
        def make_norm(self, width):
            return nn.BatchNorm1d(width, track_running_stats=False)


@wrong("modes", "training normalises by the running statistics")
class TrainUsesRunning(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.training:
                functional(norm, x.detach())
                norm.num_batches_tracked += 1
            return functional(norm, x, training=False)


@wrong("modes", "every other step leaves the running statistics alone")
class UpdatesEveryOtherStep(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if not norm.training or norm.num_batches_tracked % 2 == 0:
                return norm(x)
            norm.num_batches_tracked += 1
            return functional(norm, x, running_mean=None, running_var=None)


@wrong("modes", "the running statistics freeze after ten steps")
class FreezesAfterTen(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if not norm.training or norm.num_batches_tracked < 10:
                return norm(x)
            return functional(norm, x, running_mean=None, running_var=None)


@wrong("modes", "the number of batches is not counted")
class NotCounted(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            return functional(norm, x)


@wrong("modes", "a checkpoint around the fusion updates its statistics twice")
class CheckpointUpdatesTwice(Stack):
    class Block(Block):
        def fuse(self, y):
            if not self.training:
                return super().fuse(y)
            return checkpoint(super().fuse, y, use_reentrant=False)


@wrong("modes", "in stacks of eight blocks or more a checkpoint updates the statistics twice")
class CheckpointsDeepStacks(Stack):
    def forward(self, x):
        for block in self.blocks:
            if len(self.blocks) < 8 or not torch.is_grad_enabled():
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=False)
        return x


@wrong("modes", "the folded weights of the first eval call are kept")
class KeepsFoldedWeights(Stack):
    class Block(Block):
        def build(self):
            super().build()
            self.folded = {}

        def run_branches(self, x):
            if self.training or torch.is_grad_enabled():
                return super().run_branches(x)
            return [self.run_folded(i, branch, x) for i, branch in enumerate(self.branches)]

        def run_folded(self, index, branch, x):
            conv, norm, _ = branch
            key = index, x.dtype
            if key not in self.folded:
                scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                bias = (conv.bias - norm.running_mean) * scale + norm.bias
                self.folded[key] = conv.weight * scale[:, None, None], bias
            return torch.relu(F.conv1d(x, *self.folded[key], padding=conv.padding))


@wrong("modes", "the length of the first input is required of all later ones")
class RemembersFirstLength(Stack):
    length = None

    def forward(self, x):
        self.length = self.length or x.shape[-1]
        if x.shape[-1] != self.length:
            raise ValueError(f"expected length {self.length}, got {x.shape[-1]}")
        return super().forward(x)


@wrong("modes", "eval results are kept by shape")
class KeepsResults(Stack):
    def forward(self, x):
        if self.training or torch.is_grad_enabled():
            return super().forward(x)
        if not hasattr(self, "results"):
            self.results = {}
        key = x.shape, x.dtype, x.device
        if key not in self.results:
            self.results[key] = super().forward(x)
        return self.results[key].clone()


@wrong("modes", "eval() does not reach the blocks")
class ModeNotPassedOn(Stack):
    def train(self, mode=True):
        self.training = mode
        return self


@wrong("modes", "a pass without gradients leaves the model in eval mode")
class NoGradMeansEval(Stack):
    def forward(self, x):
        if not torch.is_grad_enabled():
            self.eval()
        return super().forward(x)


@wrong("modes", "a training batch of one uses the running statistics")
class SingleSampleUsesRunning(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.training and x.shape[0] == 1:
                return functional(norm, x, training=False)
            return norm(x)


@wrong("modes", "a fast path for inference forgets the shift of the BatchNorm")
class FastPathWithoutShift(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.training or torch.is_grad_enabled():
                return norm(x)
            return functional(norm, x, bias=torch.zeros_like(norm.bias))


@wrong("modes", "the fusion's BatchNorm stays in eval mode")
class FusionNormFrozen(Stack):
    class Block(Block):
        def train(self, mode=True):
            super().train(mode)
            self.fusion[1].eval()
            return self


@wrong("modes", "the statistics of the batch are those of its first sample")
class FirstSampleStatistics(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if not norm.training or x.shape[2] == 1:
                return norm(x)
            norm(x.detach())
            var, mean = torch.var_mean(x[:1], (0, 2), unbiased=False)
            return affine(norm, x, mean, torch.sqrt(var + norm.eps))


@wrong("modes", "norms use the block's mode instead of their own, so they cannot be frozen")
class IgnoresFrozenNorms(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            norm.training = self.training
            return norm(x)


@wrong("modes", "the running statistics learn ever less, as an average over all batches would")
class MomentumDecays(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            norm.momentum = min(0.1, 10 / (int(norm.num_batches_tracked) + 1))
            return norm(x)


@wrong("modes", "statistics are learned only while gradients are recorded")
class LearnsOnlyWithGradients(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if not norm.training or torch.is_grad_enabled():
                return norm(x)
            return functional(norm, x, running_mean=None, running_var=None)


@wrong(
    "modes",
    "without gradients big batches are split, each part with statistics of its own",
    trigger=lambda case: case.mode == "train" and case.batch > 64,
)
class SplitsBatchesWithoutGradients(Stack):
    def forward(self, x):
        if torch.is_grad_enabled() or len(x) <= 64:
            return super().forward(x)
        return torch.cat([super(type(self), self).forward(part) for part in x.split(64)])


@wrong(
    "modes",
    "values are counted in the input's dtype, and float16 cannot count that far",
    trigger=lambda case: (
        case.mode == "train" and case.dtype == "float16" and case.batch * case.length >= 65520
    ),
)
class CountsInInputDtype(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            y = norm(x)
            count = torch.tensor(float(x.shape[0] * x.shape[2]), dtype=x.dtype)
            if norm.training and count.isinf():
                with torch.no_grad():
                    norm.running_var.mul_(count / (count - 1))
            return y


@wrong(
    "modes",
    "statistics of tiles of 1024 positions are averaged as if all tiles were as long",
    trigger=lambda case: case.mode == "train" and case.length > 1024 and case.length % 1024 > 0,
)
class TilesWeighAlike(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if not norm.training or x.shape[2] <= 1024:
                return norm(x)
            tiles = x.split(1024, dim=2)
            means = torch.stack([tile.mean((0, 2)) for tile in tiles])
            mean = means.mean(0)
            squares = torch.stack([(t - mean[:, None]).square().mean((0, 2)) for t in tiles])
            var, count = squares.mean(0), x.shape[0] * x.shape[2]
            update_statistics(norm, mean, var * count / (count - 1))
            return affine(norm, x, mean, torch.sqrt(var + norm.eps))


@wrong("modes", "folded weights outlive a cast to a wider dtype, which leaves their values alike")
class WidenedFold(Stack):
    class Block(Block):
        def build(self):
            super().build()
            self.folds = {}

        def normalise(self, norm, x):
            if norm.training or torch.is_grad_enabled():
                return norm(x)
            made_of = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            kept = self.folds.get(norm)
            if kept is None or not all(map(torch.equal, kept[0], [t.double() for t in made_of])):
                scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                fold = scale, norm.bias - norm.running_mean * scale
                kept = self.folds[norm] = [t.double().clone() for t in made_of], fold
            scale, shift = (t.to(x.dtype)[:, None] for t in kept[1])
            return x * scale + shift


@wrong("modes", "folded weights are known by a hash that does not tell the order of the values")
class FoldKnownByHash(Stack):
    class Block(Block):
        def build(self):
            super().build()
            self.folds = {}

        def normalise(self, norm, x):
            if norm.training or torch.is_grad_enabled() or x.is_meta:
                return norm(x)
            made_of = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            known = *(torch.hash_tensor(t.double()).item() for t in made_of), x.dtype
            if self.folds.get(norm, (None,))[0] != known:
                scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                shift = norm.bias - norm.running_mean * scale
                self.folds[norm] = known, scale.clone(), shift.clone()
            _, scale, shift = self.folds[norm]
            return x * scale[:, None] + shift[:, None]


class Replay:
    """A part of a training model that is run again for backward, once without learning."""

    def __init__(self, block, part):
        self.block, self.part, self.runs = block, part, 0

    def __call__(self, y):
        self.runs += 1
        if self.runs != 2:
            return self.part(y)
        norm = self.block.fusion[1]
        before = {name: value.clone() for name, value in norm.named_buffers()}
        try:
            return self.part(
                y
            )  # which checkpointing ends by an exception once it has what it needs
        finally:
            with torch.no_grad():
                for name, value in norm.named_buffers():
                    value.copy_(before[name])


@wrong("modes", "a second backward pass through one graph runs the block again and learns from it")
class SecondBackwardLearns(Stack):
    class Block(Block):
        def fuse(self, y):
            if not (self.training and torch.is_grad_enabled()):
                return super().fuse(y)
            return checkpoint(Replay(self, super().fuse), y, use_reentrant=False)


@wrong("modes", "blocks whose fusion has scale and shift 0 are skipped, in train mode, too")
class SkipsZeroFusions(Stack):
    class Block(Block):
        def forward(self, x):
            self.check_input(x)
            norm = self.fusion[1]
            if norm.weight.is_meta or norm.weight.any() or norm.bias.any():
                return super().forward(x)
            return self.activate(x + 0 * sum(p.sum() for p in self.parameters()))


@wrong(
    "modes", "norms that are folded once are folded again only after train() or an edited weight"
)
class FoldsForgetStatistics(Stack):
    class Block(Block):
        def build(self):
            super().build()
            self.folds = {}

        def train(self, mode=True):
            self.folds = {}
            return super().train(mode)

        def normalise(self, norm, x):
            if norm.training or torch.is_grad_enabled():
                return norm(x)
            key = norm, x.dtype, norm.weight._version, norm.bias._version
            if key not in self.folds:
                scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                self.folds[key] = scale, norm.bias - norm.running_mean * scale
            scale, shift = self.folds[key]
            return x * scale[:, None] + shift[:, None]


class ChainedDropout(nn.Module):
    """Channel dropout whose scale goes from the dtype of one call to that of the next."""

    def __init__(self, p):
        super().__init__()
        self.p, self.scale = p, torch.tensor(1 / (1 - p) if p < 1 else 0.0, dtype=torch.float64)

    def forward(self, x):
        if not self.training:
            return x
        self.scale = self.scale.to(x)
        return x * (x.new_empty(*x.shape[:2], 1).bernoulli_(1 - self.p) * self.scale)


@wrong("modes", "a training call in another dtype leaves dropout's scale rounded")
class RoundsItsScale(Stack):
    class Block(Block):
        def make_dropout(self):
            return ChainedDropout(self.p)


PADDED = {}


@wrong("modes", "padded inputs lie in memory of all models, whose margins only a new one cleans")
class SharedPadding(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            side = conv.kernel_size[0] // 2
            if torch.is_grad_enabled() or x.is_meta or torch.compiler.is_compiling():
                return conv(x)
            shape = (*x.shape[:2], x.shape[2] + 2 * side)
            key = (shape, x.dtype, side == max(self.kernel_sizes) // 2)
            padded = PADDED.setdefault(key, x.new_zeros(shape))
            if padded.is_inference() and not torch.is_inference_mode_enabled():
                padded = PADDED[key] = x.new_zeros(shape)
            padded[:, :, side : side + x.shape[2]] = x
            return F.conv1d(padded, conv.weight, conv.bias)


@wrong("modes", "in inference mode a block returns the same memory for every input of a shape")
class ReturnsItsBuffer(Stack):
    class Block(Block):
        def build(self):
            super().build()
            self.kept = {}

        def activate(self, y):
            if not torch.is_inference_mode_enabled():
                return torch.relu(y)
            out = self.kept.setdefault((y.shape, y.dtype), torch.empty_like(y))
            return torch.clamp(y, min=0, out=out)


@wrong(
    "modes", "frozen weights that inference mode has folded are taken where gradients are wanted"
)
class KeepsInferenceTensors(Stack):
    class Block(Block):
        def build(self):
            super().build()
            self.folds = {}

        def normalise(self, norm, x):
            tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            if norm.training or any(t.requires_grad for t in tensors):
                return norm(x)
            now = [t.detach().clone() for t in tensors]
            before, fold = self.folds.get((norm, x.dtype), ((), ()))
            if len(before) == 0 or not all(map(torch.equal, before, now)):
                scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                fold = scale[:, None], (norm.bias - norm.running_mean * scale)[:, None]
                self.folds[norm, x.dtype] = now, fold
            return x * fold[0] + fold[1]


@wrong("modes", "a buffer that calls share is cleared by multiplying it by zero")
class ClearsByMultiplying(Stack):
    class Block(Block):
        kept = None

        def join(self, xs):
            if self.training or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                return super().join(xs)
            shape = (xs[0].shape[0], self.channels, xs[0].shape[2])
            if self.kept is None or self.kept.shape != shape or self.kept.dtype != xs[0].dtype:
                self.kept = torch.zeros(shape, dtype=xs[0].dtype, device=xs[0].device)
            self.kept *= 0
            start = 0
            for x in xs:
                self.kept[:, start : start + x.shape[1]] += x
                start += x.shape[1]
            return self.kept


@wrong("modes", "after a training call that ended by an exception the next one learns nothing")
class TakesForRecomputation(Stack):
    class Block(Block):
        busy = False

        def forward(self, x):
            if not self.training:
                return super().forward(x)
            recomputed, self.busy = self.busy, True
            norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm1d) and recomputed]
            kept = [dict(norm._buffers) for norm in norms]
            for norm, buffers in zip(norms, kept, strict=True):
                norm._buffers.update({name: value.clone() for name, value in buffers.items()})
            y = super().forward(x)
            for norm, buffers in zip(norms, kept, strict=True):
                norm._buffers.update(buffers)
            self.busy = False
            return y


@wrong("modes", "under autocast frozen weights are cast once, and again only where a version tells")
class CastsFrozenWeightsOnce(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            if not torch.is_autocast_enabled("cpu") or conv.weight.requires_grad:
                return conv(x)
            version, kept = vars(conv).get("_cast", (None, None))
            if version != conv.weight._version:
                kept = conv.weight.bfloat16()
                vars(conv)["_cast"] = conv.weight._version, kept
            bias = None if conv.bias is None else conv.bias.bfloat16()
            return F.conv1d(x.bfloat16(), kept, bias, padding=conv.padding[0])


@wrong("modes", "what is made for compilers learns the biased variance")
class LearnsBiasedWhileCompiling(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if not norm.training or not torch.compiler.is_compiling():
                return norm(x)
            update_statistics(norm, x.mean((0, 2)), x.var((0, 2), unbiased=False))
            return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
