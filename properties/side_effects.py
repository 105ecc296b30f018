"""Side effects: a call changes nothing but its result."""

import gc
import random
import sys
import weakref
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import torch

from rescnn_verify.compare import attempt, equal, holds, same_bits, same_tensors
from rescnn_verify.histories import interrupting
from rescnn_verify.needs import CONTRACT
from rescnn_verify.probes import as_input, normal_input
from rescnn_verify.space import INPUTS, Choice, Space, at_least
from rescnn_verify.statement import statement
from rescnn_verify.subject import (
    CONTEXTS,
    DTYPES,
    flushes_subnormals,
    seed_everything,
    seed_torch,
    supported_under,
)

SMALL = INPUTS.narrow(batch=at_least(1))


@statement(space=SMALL.narrow(context=Choice(*CONTEXTS)), effort=0.6, inputs=16)
def input_is_unchanged(subject, case):
    """The input holds the same values after a call, under grad, no_grad and inference mode."""
    model = subject.model(case)
    x = normal_input(case)
    before = x.clone()
    with CONTEXTS[case["context"]]():
        out = subject(model, x)
    yield same_bits(x, before, f"input after a call under {case['context']}")
    yield equal((x.requires_grad, x.grad), (False, None), "requires_grad and grad of the input")
    if case["context"] == "grad" and out.requires_grad:
        subject.backward(out, torch.ones_like(out))
        yield same_bits(x, before, "input after backward")


@statement(space=SMALL.narrow(context=Choice(*CONTEXTS)), effort=0.4, inputs=16)
def gradients_are_left_alone(subject, case):
    """A call leaves the gradients of parameters alone, under grad, no_grad and inference mode.

    As when a model is evaluated between a backward pass and the step of the optimiser.
    """
    model = subject.model(case)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    with CONTEXTS[case["context"]]():
        subject(model, normal_input(case))
    after = {name: parameter.grad for name, parameter in model.named_parameters()}
    yield equal([n for n in after if after[n] is not before[n]], [], "gradients that were replaced")
    ones = {name: torch.ones_like(gradient) for name, gradient in before.items()}
    yield same_tensors(before, ones, "gradients after a call")


@statement(
    space=SMALL.narrow(
        device=Choice("cpu"), layout=Choice("contiguous"), context=Choice(*CONTEXTS)
    ),
    effort=0.4,
    inputs=16,
)
def input_is_not_kept(subject, case):
    """After a call nothing keeps the input's memory: no attribute, view, cache or graph.

    The tensor lies in the memory of a NumPy array, which lives as long as anything refers to it.
    """
    model = subject.model(case)
    memory = np.zeros(case.shape, dtype=np.int16 if case.dtype.endswith("16") else case.dtype)
    x = torch.from_numpy(memory)
    x = x.view(DTYPES[case.dtype]) if case.dtype.endswith("16") else x
    x.copy_(normal_input(case))
    with CONTEXTS[case["context"]]():
        subject(model, x)
    alive = weakref.ref(memory)
    del x, memory
    if alive() is not None:
        gc.collect()
    yield holds(alive() is None, "the input's memory after its last use", "freed", "kept")


@statement(
    space=SMALL.narrow(
        mode=Choice("eval"),
        layout=Choice("contiguous", "transposed"),
        context=Choice(*CONTEXTS),
        born=Choice(*CONTEXTS),
    ),
    effort=0.4,
    inputs=16,
)
def an_input_filled_anew_is_another_input(subject, case):
    """In eval mode a tensor that is filled anew between two calls gives the output of its values.

    As a server's buffer is; born in inference mode, it has no version counter.
    """
    model = subject.model(case)
    values = normal_input(case, "other values")
    with CONTEXTS[case["born"]]():
        x = normal_input(case)
    inference = x.is_inference()
    with CONTEXTS["inference_mode" if inference else case["context"]]():
        subject(model, x)
        x.copy_(values)
        yield same_bits(subject(model, x), subject(model, x.clone()), "output of new values")


@statement(space=SMALL.narrow(layout=Choice("contiguous")), needs=(CONTRACT,), effort=0.5)
def kernel_list_is_neither_changed_nor_kept(subject, case):
    """The caller's list of kernels is as before, and changing it later changes nothing."""
    kernels = list(case.kernel_sizes)
    cls = subject.target.constructor
    arguments = {"channels": case.channels, "kernel_sizes": kernels, "dropout": case.dropout}
    if subject.target.kind == "stack":
        arguments["num_blocks"] = case.num_blocks
    model = attempt("building with a list of kernels", lambda: cls(**arguments))
    yield equal(kernels, list(case.kernel_sizes), "caller's list after building")
    dtype = normal_input(case).dtype
    subject.set_mode(
        attempt("moving the model", lambda: model.to(dtype=dtype, device=case.device)), "eval"
    )
    x = normal_input(case)
    with torch.no_grad():
        before = subject(model, x)
        field = _field(subject, model, case)
        yield equal(kernels, list(case.kernel_sizes), "caller's list after a call")
        kernels.append(99)
        kernels[0] = 1
        kernels.reverse()
        yield equal(_field(subject, model, case), field, "receptive field after changing the list")
        yield same_bits(subject(model, x), before, "output after changing the list")
        kernels.clear()
        yield equal(_field(subject, model, case), field, "receptive field after clearing the list")
        yield same_bits(subject(model, x), before, "output after clearing the list")
    kept = [
        f"{name or 'model'}.{attribute}"
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if value is kernels
    ]
    yield equal(kept, [], "attributes that are the caller's list")


def _field(subject, model, case):
    if (claim := subject.target.claims.get("receptive field")) is None:
        return None
    return attempt("claimed receptive field", lambda: claim(model, case.config))


@statement(
    space=SMALL.narrow(
        layout=Choice("contiguous"), device=Choice("cpu"), context=Choice(*CONTEXTS)
    ),
    effort=0.4,
)
def no_global_seed_is_reset(subject, case):
    """Building and calling a model leaves every random generator where its own draws put it.

    They may draw from torch's generator, but not reset it: from two different states it must come
    out in two different states. NumPy's and Python's are not touched by anything in the contract,
    so building or running may draw from them only if that, too, does not reset them.
    """
    after_building, after_calling = [], []
    for start in (case.seed, case.seed + 1):
        seed_everything(start)
        model = subject.build_with(case.config)
        after_building.append(_draws())
        subject.set_mode(model, case.mode)
        x = as_input(case, case.rng("input").standard_normal(case.shape)).float().contiguous()
        seed_everything(start)
        with CONTEXTS[case["context"]]():
            subject(model, x)
        after_calling.append(_draws())
    for what, (first, second) in (("building", after_building), ("a call", after_calling)):
        for name in first:
            yield holds(
                first[name] != second[name],
                f"{name}'s next draw after {what} from two different states",
                "two values",
                f"{first[name]} twice",
            )


@statement(space=SMALL.narrow(device=Choice("cpu")), effort=0.5)
def a_backward_pass_undoes_no_draws(subject, case):
    """Where others draw between a forward pass and its backward pass, their draws are not undone.

    What computes its dropout again must put the generator back to where the backward pass found it.
    """
    next_draws = []
    for between in (case.seed, case.seed + 1):
        model = subject.model(case)
        seed_torch(case.seed)
        out = subject(model, normal_input(case))
        seed_everything(between)
        subject.backward(out, torch.ones_like(out))
        next_draws.append(_draws())
    first, second = next_draws
    for name in first:
        what = f"{name}'s next draw after a backward pass, from two different states before it"
        yield holds(first[name] != second[name], what, "two values", f"{first[name]} twice")


@statement(
    space=SMALL.narrow(
        layout=Choice("contiguous"), device=Choice("cpu"), context=Choice(*CONTEXTS),
        ending=Choice("returns", "is refused", "is interrupted"),
        frozen=Choice("nothing", "the first half", "everything"), autocast=Choice(False, True),
    ),
    effort=0.5, inputs=16,
)  # fmt: skip
def global_settings_stay(subject, case):
    """Building and calling a model leaves torch's global settings as they were, however it ends.

    And how the processor treats subnormal numbers. A call may be refused, or be interrupted in any
    part of the model.
    """
    torch.set_flush_denormal(False)  # an earlier case's model may have set them
    torch.set_grad_enabled(True)
    before = _settings()
    model = subject.set_mode(subject.build_with(case.config), case.mode)
    yield _unchanged(before, "after building")
    parameters = list(model.parameters())
    count = {"nothing": 0, "the first half": len(parameters) // 2}.get(case["frozen"])
    for parameter in parameters[:count]:
        parameter.requires_grad_(False)
    x = as_input(case, case.rng("input").standard_normal(case.shape)).float()
    # Gradients are on already; what switches them on would switch them back.
    context = nullcontext if case["context"] == "grad" else CONTEXTS[case["context"]]
    if case["ending"] != "returns":
        end = _ended_early(model, case)
        with end as given, suppress(Exception), context():
            subject.target.call(model, x if given is None else given)
        yield _unchanged(before, f"after a call that {case['ending']}")
        return
    cast = case["autocast"]
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        within = _settings()
        with supported_under(autocast=cast), context():
            out = subject(model, x)
        yield _unchanged(within, "after a call")
    if out.requires_grad:
        with supported_under(autocast=cast):
            subject.backward(out, torch.ones_like(out))
        yield _unchanged(before, "after backward")


def _unchanged(before, when):
    after = _settings()
    changed = [name for name in before if after[name] != before[name]]
    expected, got = ({name: values[name] for name in changed} for values in (before, after))
    return equal(got, expected, f"torch's settings {when}")


@contextmanager
def _ended_early(model, case):
    """An input that is refused, or None where some part of the model interrupts any call."""
    rng = case.rng("ending")
    if case["ending"] == "is refused":
        shape, dtype = [
            ((2, case.channels + 1, 3), torch.float32),
            ((1, case.channels, 1), torch.float32),  # nothing to train on
            ((2, case.channels, 3), torch.float64),
            ((2, case.channels), torch.float32),
        ][rng.integers(4)]
        yield torch.ones(shape, dtype=dtype)
        return
    parts = list(model.modules())
    with interrupting(parts[rng.integers(len(parts))]):
        yield None


def _settings():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "default dtype": torch.get_default_dtype(),
        "grad enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "oneDNN": torch.backends.mkldnn.enabled,
        "TF32": (matmul.allow_tf32, cudnn.allow_tf32),
        "cuDNN": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "sums in 16 bits": (
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
        ),
        "autocast": torch.is_autocast_enabled("cpu"),
        "recursion limit": sys.getrecursionlimit(),
        "garbage collection": gc.isenabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "default device": str(torch.get_default_device()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "subnormal numbers": "flushed" if flushes_subnormals() else "kept",
        "NumPy errors": tuple(sorted(np.geterr().items())),
    }


def _draws():
    return {
        "torch": float(torch.rand((), dtype=torch.float64)),
        "NumPy": float(np.random.random_sample()),
        "Python": random.random(),
    }


@statement(space=Space(), needs=(CONTRACT,), effort=0.5)
def building_twice_gives_two_models(subject, case):
    """Two models of one configuration share no parameter or buffer."""
    first, second = subject.build_with(case.config), subject.build_with(case.config)
    own = {t.data_ptr() for t in (*first.parameters(), *first.buffers()) if t.numel()}
    others = {t.data_ptr() for t in (*second.parameters(), *second.buffers()) if t.numel()}
    yield equal(len(own & others), 0, "tensors in both of two models")
