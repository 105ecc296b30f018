"""State: everything is registered, saved, copied and moved, and starts out random but seeded."""

import copy
import io
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from rescnn_verify.compare import (
    Falsified,
    attempt,
    equal,
    holds,
    same_bits,
    same_tensors,
    same_values,
)
from rescnn_verify.handles import fill
from rescnn_verify.histories import kept_tensors
from rescnn_verify.needs import BATCH_NORM, CONTRACT, DIRECT, HANDLES, POST_ACTIVATION, STACK
from rescnn_verify.networks import certify
from rescnn_verify.probes import (
    LeftBehind,
    as_input,
    normal_input,
    randomise,
    state_of,
    whole_state,
)
from rescnn_verify.space import INPUTS, Choice, Integers, Space
from rescnn_verify.statement import statement
from rescnn_verify.subject import DTYPES, NotApplicable, seed_everything, seed_torch

EVAL = INPUTS.narrow(mode=Choice("eval"), batch=Integers(1, 9), length=Integers(1, 80))


@statement(space=Space(seed=INPUTS.get("seed")), needs=(CONTRACT,), effort=0.5)
def same_seed_same_initial_weights(subject, case):
    """Two models built from the same generator state are equal; from another they differ."""
    models = []
    for seed in (case.seed, case.seed, case.seed + 1):
        seed_torch(seed)
        models.append(subject.build_with(case.config))
    first, again = (state_of(model) for model in models[:2])
    yield same_tensors(again, first, "initial state from the same generator state")
    # Of fewer elements even random ones coincide too often.
    pairs = zip(models[0].named_parameters(), models[2].parameters(), strict=True)
    alike = [n for (n, p), q in pairs if p.dim() > 1 and p.numel() > 4 and torch.equal(p, q)]
    yield equal(alike, [], "weights that are the same from another generator state")


@statement(space=Space(seed=INPUTS.get("seed")), needs=(HANDLES, BATCH_NORM), effort=1)
def initial_weights_are_not_degenerate(subject, case):
    """No convolution starts with constant weights, no two start alike, and norms start unbiased.

    A constant is what no gradient tells apart, and two layers alike are one layer twice. Running
    statistics start at mean 0 and variance 1 with no batch counted. (Norm scales are exempt: a
    last norm that starts at zero is a usual choice.)
    """
    seed_torch(case.seed)
    model = subject.build_with(case.config)
    weights = []
    for i, block in enumerate(subject.handles(model, case)):
        for j, layer in enumerate(block.layers):
            where = f"layer {j} of block {i}"
            weight, norm = layer.conv.weight.detach(), layer.norm
            constant = not weight.any() or (weight.numel() > 4 and len(torch.unique(weight)) == 1)
            yield equal(constant, False, f"initial weights of {where} are constant or zero")
            yield equal(set(norm.running_mean.tolist()), {0.0}, f"initial mean of {where}")
            yield equal(set(norm.running_var.tolist()), {1.0}, f"initial variance of {where}")
            counted = int(norm.num_batches_tracked)
            yield equal(counted, 0, f"initial num_batches_tracked of {where}")
            if weight.numel() > 4:
                twins = [w for w, other in weights if torch.equal(other, weight)]
                yield equal(twins, [], f"layers with the same initial weights as {where}")
                weights.append((where, weight))


@statement(space=EVAL, effort=0.25)
def everything_moves_with_the_model(subject, case):
    """After `.to(dtype)` every floating parameter and buffer has the dtype, and forward works.

    The parameters are the objects that they were, so that an optimizer goes on training them.
    Moved to the meta device every parameter and buffer is there, no operation mixes it with a
    floating-point tensor that stayed behind, and forward gives a meta tensor of the same shape. A
    forward pass that looks at its data cannot run there, which is no fault.
    """
    model = subject.model(case)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, t in tensors if t.is_floating_point() and t.dtype != DTYPES[case.dtype]]
    yield equal(left, [], f"tensors that did not move to {case.dtype}")
    x = normal_input(case)
    with torch.no_grad():
        yield equal(subject(model, x).dtype, x.dtype, "output dtype")
    before = dict(model.named_parameters())
    other = replace(case, dtype="float32" if case.dtype == "float64" else "float64")
    if subject.target.promises(other):
        attempt(f"moving the model to {other.dtype}", lambda: model.to(DTYPES[other.dtype]))
        new = [name for name, p in model.named_parameters() if p is not before.get(name)]
        attempt("moving the model back", lambda: model.to(x.dtype))
        yield equal(new, [], f"parameters that are other objects after moving to {other.dtype}")
    abstract = attempt("moving to the meta device", lambda: subject.build(case).to("meta"))
    subject.set_mode(abstract, "eval")
    tensors = [*abstract.named_parameters(), *abstract.named_buffers()]
    left = [name for name, t in tensors if t.device.type != "meta"]
    yield equal(left, [], "tensors that did not move to the meta device")
    with torch.no_grad(), LeftBehind("meta") as left:
        try:
            out = subject(abstract, x.to("meta"))
        except Falsified:
            out = None
    yield equal(left.seen, [], "tensors on another device that the forward pass on meta uses")
    if out is None:
        return
    expected = ("meta", subject.output_shape(case))
    yield equal((out.device.type, tuple(out.shape)), expected, "output on meta")


def _through_state_dict(subject, model, case):
    other = subject.build(case)
    randomise(other, np.random.default_rng(case.seed + 1))
    state = whole_state(model)
    attempt("load_state_dict", lambda: other.load_state_dict(state))
    return other


def _through_assignment(subject, model, case, dtype=None):
    """Assigned to a model of that dtype, else of the same: assigned tensors bring theirs.

    Nothing says the dtype of a buffer that is not among them.
    """
    before = replace(case, dtype=dtype or case.dtype)
    passing = any(module._non_persistent_buffers_set for module in model.modules())
    if passing or not subject.target.promises(before):
        before = case
    other = subject.build(before)
    with torch.no_grad():
        subject(subject.set_mode(other, "eval"), normal_input(before))
    state = whole_state(model)
    attempt("load_state_dict(assign=True)", lambda: other.load_state_dict(state, assign=True))
    return other


def _through_replacement(subject, model, case):
    other = subject.build(case)
    with torch.no_grad():
        subject(subject.set_mode(other, "eval"), normal_input(case))
    for source, module in zip(model.modules(), other.modules(), strict=True):
        for name, parameter in source.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
        for name, buffer in source.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())
    return other


def _through_save(subject, model, case):
    file = io.BytesIO()
    attempt("torch.save", lambda: torch.save(model.state_dict(), file))
    file.seek(0)
    state = attempt("torch.load", lambda: torch.load(file, weights_only=True))
    other = subject.build(case)
    attempt("load_state_dict", lambda: other.load_state_dict(state))
    return other


def _through_deepcopy(subject, model, case):
    return attempt("copy.deepcopy", lambda: copy.deepcopy(model))


def _through_pickle(subject, model, case):
    try:
        data = pickle.dumps(model)
    except Exception as error:
        raise NotApplicable(f"the model refuses to be pickled: {error}") from error
    return attempt("unpickling", lambda: pickle.loads(data))


@statement(
    space=EVAL.narrow(
        way=Choice(
            "state_dict", "assignment", "assignment to float32", "replacement", "torch.save",
            "deepcopy",
        ),
        values=Choice("ordinary", "some zero or tiny"),
    ),
    effort=0.3,
)  # fmt: skip
def copies_are_the_same_function(subject, case):
    """Loaded, assigned, replaced, saved or copied tensors give the same function.

    To the bit: in eval mode, in train mode under the same generator, and after training. Training
    the copy does not change the original.
    """
    ways = {
        "state_dict": _through_state_dict,
        "assignment": _through_assignment,
        "assignment to float32": partial(_through_assignment, dtype="float32"),
        "replacement": _through_replacement,
        "torch.save": _through_save,
        "deepcopy": _through_deepcopy,
    }
    yield from _same_function(subject, case, ways[case["way"]], case["values"])


@statement(space=EVAL.narrow(length=Integers(1, 20)), effort=0.12)
def a_pickled_model_is_the_same_function(subject, case):
    """A pickled model is the same function, to the bit; a model may refuse to be pickled."""
    yield from _same_function(subject, case, _through_pickle)


@statement(
    space=Space(dtype=Choice("float32"), seed=INPUTS.get("seed"), way=Choice("deepcopy", "pickle")),
    effort=0.4,
)
def a_copy_keeps_what_is_frozen(subject, case):
    """A deep copy or pickle has the same parameters frozen and the same submodules in eval mode."""
    model = subject.model(case)
    rng = case.rng("frozen")
    for parameter in model.parameters():
        parameter.requires_grad_(bool(rng.integers(2)))
    for module in model.modules():
        module.training = bool(rng.integers(2))
    way = {"deepcopy": _through_deepcopy, "pickle": _through_pickle}[case["way"]]
    other = way(subject, model, case)
    yield equal(_frozen(other), _frozen(model), "frozen parameters of the copy")
    yield equal(_training(other), _training(model), "submodules of the copy in train mode")


def _frozen(model):
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def _training(model):
    return [name for name, module in model.named_modules() if module.training]


def _same_function(subject, case, way, values="ordinary"):
    model = subject.model(case)
    randomise(model, case.rng("weights"))
    x = normal_input(case)
    wide = x if case.batch * case.length > 1 else torch.cat([x, -x])
    subject.set_mode(model, "train")
    with torch.no_grad():
        subject(model, wide)
    subject.set_mode(model, "eval")
    if values != "ordinary":
        _thin_out(model, case.rng("values"))
    other = subject.set_mode(way(subject, model, case), "eval")
    yield same_tensors(state_of(other), state_of(model), "state_dict of the copy")
    outputs = []
    for built in (model, other):
        seed_torch(case.seed)
        with torch.no_grad():
            steps = [subject(built, x)]
            subject.set_mode(built, "train")
            steps.append(subject(built, wide))
            subject.set_mode(built, "eval")
            steps.append(subject(built, x))
        outputs.append(steps)
    whens = ("in eval mode", "in train mode", "in eval mode after training")
    for when, first, second in zip(whens, *outputs, strict=True):
        yield same_bits(second, first, f"output of the copy {when}")
    before = state_of(model)
    randomise(other, np.random.default_rng(case.seed))
    yield same_tensors(state_of(model), before, "original after changing the copy")


def _thin_out(model, rng):
    """Makes a quarter of all values zero and another one tiny, variances of dead channels too."""
    for _, _, tensor in kept_tensors(model):
        factors = rng.choice([1.0, 1.0, 0.0, 2.0**-30], size=tuple(tensor.shape))
        fill(tensor, tensor.detach().cpu().double().numpy() * factors)


@statement(
    space=EVAL.narrow(
        through=Choice("nothing", "another dtype"), named=Choice("module", "model", "0", "blocks")
    ),
    effort=0.4,
)
def a_part_of_another_model_is_the_same_function(subject, case):
    """As a part of another module, which moves, loads and switches it, a model is as it is alone.

    To the bit: the outputs in both modes, and what it learns, under whatever name. The other module
    reaches its parts' tensors and modes by itself, and calls neither their ``to``,
    ``load_state_dict`` nor ``eval``.
    """
    model = subject.model(case)
    randomise(model, case.rng("weights"))
    part = subject.build_with(case.config)
    whole = torch.nn.ModuleDict({"before": torch.nn.Identity(), case["named"]: part})
    dtypes = [case.dtype]
    other = "float32" if case.dtype == "float64" else "float64"
    if case["through"] != "nothing" and subject.target.promises(replace(case, dtype=other)):
        dtypes.insert(0, other)
    for dtype in dtypes:
        attempt(
            f"moving a model around the model to {dtype}",
            lambda dtype=dtype: whole.to(device=case.device, dtype=DTYPES[dtype]),
        )
    saved = attempt(
        "state_dict of a model around the model",
        lambda: torch.nn.ModuleDict({case["named"]: model}).state_dict(),
    )
    saved = {name: copy.deepcopy(value) for name, value in saved.items()}
    attempt("load_state_dict of a model around the model", lambda: whole.load_state_dict(saved))
    x = normal_input(case)
    wide = x if case.batch * case.length > 1 else torch.cat([x, -x])
    for mode, given in (("eval", x), ("train", wide), ("eval", x)):
        outputs = []
        for switched, called in ((model, model), (whole, part)):
            subject.set_mode(switched, mode)
            seed_torch(case.seed)
            with torch.no_grad():
                outputs.append(subject(called, given))
        yield same_bits(outputs[1], outputs[0], f"output of a part in {mode} mode")
    yield same_tensors(state_of(part), state_of(model), "state of a part after training")


@statement(space=EVAL, needs=(HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT), effort=0.5)
def functional_call_uses_the_tensors_it_is_given(subject, case):
    """torch.func.functional_call with another model's state gives the other model's function.

    To the bit on a certified integer network, and the model's own tensors stay as they were.
    """
    model = subject.model(case)
    found = certify(subject.handles(model, case), case, bits="forward_bits")
    if found is None:
        return
    state = {f"module.{name}": value for name, value in state_of(model).items()}
    x = as_input(case, found.x)
    with torch.no_grad():
        expected = subject(model, x)
        other = subject.set_mode(subject.build(case), "eval")
        before = subject(other, x)

        def call(module, value):
            bound = _Bound(module, subject.target.call)
            return torch.func.functional_call(bound, state, (value,))

        yield same_values(subject(other, x, call=call), expected, "output of functional_call")
        yield same_bits(subject(other, x), before, "output after functional_call")


class _Bound(torch.nn.Module):
    """A module together with the way it is called."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x):
        return self.call(self.module, x)


@statement(space=Space(), needs=(CONTRACT,), effort=0.5)
def the_state_dict_names_every_tensor(subject, case):
    """The state_dict has every parameter and persistent buffer once, in its own memory.

    (A buffer that is registered as not persistent holds what can be made anew; whether it is made,
    the function of a loaded copy shows.)
    """
    model = subject.build(case)
    passing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    tensors = {name: tensor for name, tensor in tensors.items() if name not in passing}
    state = model.state_dict()
    yield equal(set(state_of(model)), set(tensors), "names in the state_dict")
    for name, tensor in tensors.items():
        yield equal(state[name].data_ptr(), tensor.data_ptr(), f"memory of {name}")


@statement(space=Space(seed=INPUTS.get("seed")), needs=(STACK,))
def a_missing_entry_is_refused(subject, case):
    """load_state_dict refuses a state_dict without one of the entries, and one with another.

    (torch itself lets num_batches_tracked be missing.)
    """
    model = subject.build(case)
    state = model.state_dict()
    names = sorted(name for name in state_of(model) if not name.endswith("num_batches_tracked"))
    if not names:
        raise Falsified("entries of the state_dict", "the weights of every layer", "none")
    name = names[case.rng("entry").integers(len(names))]
    for what, changed in (
        (f"without {name}", {k: v for k, v in state.items() if k != name}),
        ("with a foreign entry", {**state, "no.such.entry": torch.zeros(1)}),
    ):
        try:
            model.load_state_dict(changed)
            refused = False
        except Exception:
            refused = True
        yield holds(refused, f"load_state_dict {what}", "an exception", "it loads")


@statement(
    space=Space(dtype=Choice("float32", "float64"), seed=INPUTS.get("seed")),
    needs=(CONTRACT,),
    effort=0.4,
)
def building_draws_only_from_torch(subject, case):
    """Initial weights are a function of torch's generator alone, not of NumPy's or Python's."""
    states = []
    for seed in (1, 2):
        seed_everything(seed)
        seed_torch(case.seed)
        states.append(state_of(subject.build_with(case.config)))
    for name, value in states[0].items():
        yield same_bits(
            states[1][name], value, f"initial {name} from other NumPy and Python states"
        )
