"""A subject: a target as a property handles it, one trial long."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rescnn_verify.case import Case, Config
from rescnn_verify.compare import Falsified, NotApplicable, attempt, equal
from rescnn_verify.handles import BlockHandles
from rescnn_verify.space import Constraint
from rescnn_verify.target import Target, TargetError

__all__ = [
    "AUTOCAST_IN_FLOAT32",
    "CONTEXTS",
    "DTYPES",
    "SETTINGS",
    "NotApplicable",
    "NothingCompiledError",
    "Subject",
    "compiled",
    "environment",
    "flushes_subnormals",
    "has_onednn",
    "kernel_sets",
    "onednn",
    "seed_everything",
    "seed_torch",
    "supported_under",
    "tf32",
]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

#: How many batches the norms of a case's model have counted, and what torch calls that; many seeds
#: have a model that never trained.
BATCHES, COUNTER = (0, 1, 0, 100, 0, 9, 1000), "num_batches_tracked"

#: How a forward pass may be called.
CONTEXTS = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


AUTOCAST_IN_FLOAT32 = Constraint(
    "autocast in float32 only", lambda c: c.dtype == "float32" or not c["autocast"]
)


class NothingCompiledError(RuntimeError):
    """A compiler compiled nothing."""


class Subject:
    """Builds, restores and runs the target's modules; an exception of theirs falsifies.

    A module is built once for each (configuration, dtype, device) of a trial. Before every case its
    parameters, buffers, gradients and mode are those it was built with, so that what a case shows
    does not depend on the cases before it, unless the target itself remembers them. Only the number
    of batches that its norms have counted follows the case's seed.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._built: dict[tuple[Config, str, str], _Built] = {}
        self._configs: dict[nn.Module, Config] = {}
        self._handles: dict[nn.Module, tuple[BlockHandles, ...]] = {}

    def model(self, case: Case, *, mode: str | None = None) -> nn.Module:
        """The module for a case, in the state it was built with, in the case's mode."""
        key = (case.config, case.dtype, case.device)
        if key in self._built:
            built = self._built[key]
            built.restore()
        else:
            built = self._built[key] = _Built(self.build(case))
        built.count_batches(BATCHES[case.seed % len(BATCHES)])
        mode = mode or case.mode
        if not built.is_in(mode):
            self.set_mode(built.model, mode)
        return built.model

    def build(self, case: Case) -> nn.Module:
        """A new module for a case, its initial weights a function of the configuration alone."""
        seed_everything(_seed_of(case.config))
        model = self.build_with(case.config)
        return attempt(  # type: ignore[no-any-return]
            f"moving the model to {case.dtype} on {case.device}",
            lambda: model.to(device=case.device, dtype=DTYPES[case.dtype]),
        )

    def build_with(self, config: Config) -> nn.Module:
        """A new module from whatever random state there is."""
        model = attempt(f"building {config.describe()}", lambda: self.target.build(config))
        if not isinstance(model, nn.Module):
            raise Falsified(f"building {config.describe()}", "an nn.Module", type(model).__name__)
        self._configs[model] = config
        return model

    def twin(self, model: nn.Module, case: Case) -> nn.Module:
        """The second implementation of a module, with its weights and mode, dtype and device."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # after some models it compiles no more, with only a log line
        make = self.target.twin
        assert make is not None, "a property that compares two must list it among its needs"
        other = attempt(
            "making the second implementation",
            lambda: make(model, case.config).to(device=case.device, dtype=DTYPES[case.dtype]),
        )
        self.set_mode(other, case.mode)
        return other  # type: ignore[no-any-return]

    def set_mode(self, model: nn.Module, mode: str) -> nn.Module:
        switch = model.train if mode == "train" else model.eval
        attempt(f"switching to {mode} mode", switch)
        return model

    def __call__(
        self, model: nn.Module, x: Tensor, *, call: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """The output for x; ``call`` runs a part of the model, default the target's own call.

        Raises:
            Falsified: the call fails, or returns something else than a tensor of the shape that the
                target promises for an input of the model's own channels.
        """
        run = call or self.target.call
        what = f"forward on {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
        out = attempt(what, lambda: run(model, x))
        if not isinstance(out, Tensor):
            raise Falsified(what, "a tensor", type(out).__name__)
        config = self._configs.get(model) if call is None else None
        if config is not None and x.dim() == 3 and x.shape[1] == config.channels:
            # No statement means anything for another shape, so each is false of it.
            expected = tuple(self.target.output_shape(config, (x.shape[0], x.shape[1], x.shape[2])))
            equal(
                tuple(out.shape), expected, f"output shape for an input of shape {tuple(x.shape)}"
            )
        return out

    def lone_blocks(self, model: nn.Module, case: Case) -> tuple[BlockHandles, ...]:
        """The blocks of a model in eval mode, for properties that call each alone.

        Raises:
            NotApplicable: the model hands its blocks something of another shape, or its input's
                values in another order.
        """
        blocks = self.handles(model, case)
        shape = (2, case.channels, 3)
        probe = torch.arange(math.prod(shape), dtype=DTYPES[case.dtype], device=case.device)
        probe = probe.reshape(shape)
        given: dict[int, Any] = {}

        def note(place: int, inputs: list[Any]) -> None:
            given.setdefault(place, inputs[0].clone() if inputs else None)

        hooks = [
            block.module.register_forward_pre_hook(
                lambda _, inputs, named, i=i: note(i, [*inputs, *named.values()]), with_kwargs=True
            )
            for i, block in enumerate(blocks)
            if block.module is not None
        ]
        try:
            with torch.no_grad():
                self(model, probe)
        finally:
            for hook in hooks:
                hook.remove()
        alike = all(isinstance(x, Tensor) and x.shape == probe.shape for x in given.values())
        first = given.get(0, probe)
        permuted = alike and not torch.equal(first, probe)
        permuted = permuted and torch.equal(first.flatten().sort()[0], probe.flatten().sort()[0])
        if not alike or permuted:
            raise NotApplicable("the blocks are not made for the model's own input")
        return blocks

    def run_block(self, block: BlockHandles, x: Tensor) -> Tensor:
        """The output of one block called alone.

        Raises:
            NotApplicable: the block is not made to be called with an input alone.
        """
        module = block.module
        if module is None or not _takes(module, x):
            raise NotApplicable("the blocks are not made to be called alone")
        return self(module, x, call=lambda part, value: part(value))

    def backward(self, out: Tensor, gradient: Tensor, *, keep: bool = False) -> None:
        """Accumulates the vector-Jacobian product of ``gradient`` in the leaves' ``.grad``.

        Args:
            keep: whether the graph stays for another backward pass.
        """
        attempt("backward", lambda: torch.autograd.backward(out, gradient, retain_graph=keep))

    def vjp(self, model: nn.Module, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The output at x and Jᵀv, v broadcast to the output's shape."""
        leaf = x.detach().requires_grad_()  # not a copy, which would have another layout
        out = self(model, leaf)
        self.backward(out, v.to(out).expand_as(out))
        if leaf.grad is None:
            raise Falsified("gradient at the input", "a tensor", "None")
        return out.detach(), leaf.grad

    def output_shape(self, case: Case) -> tuple[int, ...]:
        """The output's promised shape."""
        return tuple(self.target.output_shape(case.config, case.shape))

    def field(self, case: Case) -> tuple[int, int]:
        """How many positions before and after an output it depends on, as the target says.

        Raises:
            TargetError: the target says something else than two integers of at least 0.
        """
        describe = self.target.receptive_field
        assert describe is not None, "a property that uses the field must list it among its needs"
        said = describe(case.config)
        if not (
            isinstance(said, tuple)
            and len(said) == 2
            and all(isinstance(side, int) and side >= 0 for side in said)
        ):
            raise TargetError(
                f"receptive_field must return (left, right), two integers of at least 0; for "
                f"{case.config.describe()} it returned {said!r}"
            )
        return said[0], said[1]

    def same_length(self, case: Case) -> None:
        """For statements that set output positions beside input positions.

        Raises:
            NotApplicable: the target promises an output of another length.
        """
        if self.output_shape(case)[2] != case.length:
            raise NotApplicable("the output has another length than the input")

    def handles(self, model: nn.Module, case: Case) -> tuple[BlockHandles, ...]:
        """The convolutions and norms of each block; for properties that need handles."""
        find = self.target.handles
        assert find is not None, "a property that uses handles must list them among its needs"
        if model not in self._handles:
            self._handles[model] = attempt(
                "finding the blocks' convolutions and norms", lambda: find(model, case.config)
            )
        return self._handles[model]


@contextmanager
def supported_under(autocast: bool) -> Iterator[None]:
    """What fails under autocast does not support it.

    Raises:
        NotApplicable: instead of Falsified, if autocast is on.
    """
    try:
        yield
    except Falsified as error:
        if not autocast:
            raise
        raise NotApplicable(f"the target does not support autocast: {error}") from error


@contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """Runs convolutions on the CPU with or without oneDNN, two different sets of kernels."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def kernel_sets(case: Case) -> tuple[bool, ...]:
    """Whether oneDNN is on, for each set of kernels that the case's device has."""
    return (True, False) if case.device == "cpu" else (True,)


def has_onednn(case: Case) -> bool:
    """Whether oneDNN is on for a case of a property that does not choose by itself.

    It is for one seed in 32, 0 among them: for every new shape oneDNN builds kernels, which takes
    several times as long as the arithmetic. The values themselves are compared under both sets of
    kernels.
    """
    return case.seed % 32 == 0


@contextmanager
def tf32() -> Iterator[None]:
    """Lets convolutions on CUDA round their float32 operands to TF32."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=True
    ):
        yield


@contextmanager
def compiled(model: nn.Module, backend: str = "inductor") -> Iterator[nn.Module]:
    """A model under `torch.compile`, in this process and without what was compiled before.

    Args:
        backend: of torch.compile; ``"eager"`` runs the graph as it was traced.

    Raises:
        NothingCompiledError: at the end, if there is no graph: dynamo then ran the model as it is.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import config

    torch._dynamo.reset()
    counters.clear()
    with config.patch(compile_threads=1):
        yield torch.compile(model, backend=backend)  # type: ignore[misc]
    if not counters["stats"]["unique_graphs"]:
        raise NothingCompiledError("torch.compile compiled no graph; nothing was compared")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What torch makes without being told a dtype has this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """Torch's deterministic mode, in which memory that nobody has written to holds NaN."""
    before = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Not by use_deterministic_algorithms, which changes what is compiled later, too.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextmanager
def as_if_compiling() -> Iterator[None]:
    """`torch.compiler.is_compiling` says so, as while a model is exported; nothing is compiled.

    What is made for compilers alone thus runs in a fraction of the time that tracing takes.

    Raises:
        NotApplicable: it fails, as what only a compiler can run may, or torch has changed.
    """
    if not isinstance(getattr(torch.compiler, "_is_compiling_flag", None), bool):
        raise NotApplicable("this torch tells in another way that it compiles")
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    except Falsified as error:
        raise NotApplicable(f"what is made for compilers does not run: {error}") from error
    finally:
        torch.compiler._is_compiling_flag = before


#: What else people set in torch, which changes no function.
SETTINGS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "default dtype float64": functools.partial(default_dtype, torch.float64),
    "deterministic mode": deterministic,
    "as if compiling": as_if_compiling,
}


@contextmanager
def environment() -> Iterator[None]:
    """One thread, own random states, and the settings under which the statements hold; restored.

    Subnormal numbers are kept, whatever a target has set before.

    NNPACK (float32, oneDNN off, large batches) and TF32 or reduced-precision sums are other
    algorithms than direct convolution in the dtype's own precision, so they are off.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with (
        torch.random.fork_rng(devices=_cuda_devices()),
        torch.backends.nnpack.flags(enabled=False),
        torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ),
    ):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        matmul = torch.backends.cuda.matmul
        before = (
            matmul.allow_tf32,
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
        )
        flushed = flushes_subnormals()
        torch.set_flush_denormal(False)
        matmul.allow_tf32 = False
        matmul.allow_fp16_reduced_precision_reduction = False
        matmul.allow_bf16_reduced_precision_reduction = False
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_flush_denormal(flushed)
            matmul.allow_tf32 = before[0]
            matmul.allow_fp16_reduced_precision_reduction = before[1]
            matmul.allow_bf16_reduced_precision_reduction = before[2]
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def flushes_subnormals() -> bool:
    """Whether the processor takes subnormal numbers for zero, for which torch has no getter."""
    return float(torch.tensor(2.0**-1060, dtype=torch.float64, device="cpu") * 1) == 0


def _cuda_devices() -> list[int]:
    """The CUDA device in use, if one is: asking for its state would start it."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.cuda.current_device()] if in_use else []


def seed_torch(seed: int) -> None:
    """Seeds torch's generators.

    `torch.manual_seed` would queue a call with its stack, once for every case, for a CUDA that may
    never be initialised.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def seed_everything(seed: int) -> None:
    """Seeds torch's, NumPy's and Python's global generators, for a target that draws from them."""
    seed_torch(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class _Built:
    """A module, and all that a case may change of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = tuple(model.modules())
        self.places: list[tuple[dict[str, Any], str, Tensor, bool]] = [
            (owner, name, tensor, tensor.requires_grad)
            for module in self.modules
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self.tensors = [tensor for _, _, tensor, _ in self.places]
        self.values = [tensor.detach().clone() for tensor in self.tensors]
        self.counters = [
            b for module in self.modules if (b := module._buffers.get(COUNTER)) is not None
        ]

    def restore(self) -> None:
        """Every parameter and buffer in its place, with the value and the flags it had."""
        for owner, name, tensor, requires_grad in self.places:
            owner[name] = tensor
            tensor.grad = None
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
        if self.tensors:
            with torch.no_grad():
                torch._foreach_copy_(self.tensors, self.values)

    def count_batches(self, count: int) -> None:
        """As if the norms had been trained with so many batches."""
        for counter in self.counters if count else ():
            counter.fill_(count)

    def is_in(self, mode: str) -> bool:
        """Whether every part is in a mode already, where nobody would switch to it again."""
        training = mode == "train"
        return all(module.training == training for module in self.modules)


def _takes(module: nn.Module, x: Tensor) -> bool:
    """Whether a module's forward is made for one argument."""
    try:
        inspect.signature(module.forward).bind(x)
    except TypeError:
        return False
    return type(module).forward is not nn.Module.forward


def _seed_of(config: Config) -> int:
    text = Case(**vars(config)).dumps()
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
