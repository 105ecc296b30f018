"""A target: an implementation and what it promises."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from rescnn_verify.case import Case, Config
from rescnn_verify.exits import exits_raise
from rescnn_verify.finding import contract_handles
from rescnn_verify.handles import BlockHandles
from rescnn_verify.space import ARCHITECTURES, Choice, Space

__all__ = ["AGAINST", "Target", "TargetError", "Traits", "load"]

Shape = tuple[int, int, int]

#: What is explored by default of a class with the contract's constructor.
_EXPLORED = {"stack": ARCHITECTURES, "block": ARCHITECTURES.narrow(num_blocks=Choice(1))}

#: Between the names of two implementations.
AGAINST = " against "

NORMS = ("batch", "instance", "group", "weight", "none")
DROPOUTS = ("channel", "element", "none")
CLAIMS = ("receptive field", "parameter count")


class TargetError(ValueError):
    """The target cannot be used: the message says what was given and what to do."""


@dataclass(frozen=True)
class Traits:
    """What a target promises beyond shapes; each default promises nothing.

    Args:
        norm: ``"batch"``, ``"instance"``, ``"group"``, ``"weight"``, ``"none"``, or None: not said.
        residual: ``"post-activation"`` for ``relu(x + f(x))``, another name for another form.
        dropout: ``"channel"``, ``"element"``, ``"none"``, or None: not said.
        batch_independent: in eval mode no batch row depends on another.
        checks_input: an input of the wrong rank or channel count raises.
        refuses_invalid: the constructor refuses what the contract says it cannot honour, or
            honours it fully.
        keeps_nonfinite: NaN or +inf at a position of the input leaves the output there non-finite.
        dense_field: every position of the receptive field is seen, up to the ends of the input. A
            dilated field has holes, and near the ends some of its paths may be cut.
        reentrant: in eval mode a call may begin while another one is under way, as in threads.
        direct_convolution: no FFT or Winograd algorithm of its own; those are right and yet
            neither exact on integers nor local to the bit.
    """

    norm: str | None = None
    residual: str | None = None
    dropout: str | None = None
    batch_independent: bool = False
    checks_input: bool = False
    refuses_invalid: bool = False
    keeps_nonfinite: bool = False
    direct_convolution: bool = True
    dense_field: bool = False
    reentrant: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("norm", NORMS), ("dropout", DROPOUTS)):
            if getattr(self, name) not in (None, *allowed):
                raise TargetError(
                    f"Traits({name}={getattr(self, name)!r}) is not known; allowed: "
                    f"{', '.join(allowed)}"
                )


CONTRACT_TRAITS = Traits(
    norm="batch",
    residual="post-activation",
    dropout="channel",
    batch_independent=True,
    checks_input=True,
    refuses_invalid=True,
    keeps_nonfinite=True,
    dense_field=True,
)


def _call(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out


def _same_shape(config: Config, shape: Shape) -> Shape:
    return shape


@dataclass(frozen=True)
class Target:
    """An implementation and what it promises; a property that needs more is not applicable.

    Args:
        build: makes the module for a configuration. It raises one of ``errors`` for a configuration
            that the target refuses.
        space: the configurations and inputs that it promises to honour. Factors it does not name
            are left to the property.
        call: runs the module on an input of shape (batch, channels, length) and returns one tensor;
            for modules that return tuples, take more arguments or keep a state to reset.
        output_shape: the output's shape for a configuration and an input shape; default the same.
        receptive_field: (left, right): how many input positions before and after position t the
            output at t depends on in eval mode, for a configuration. None when it is unknown or
            unbounded.
        traits: see `Traits`.
        handles: the convolutions and norms of each residual block, None when there are none to
            be found; `contract_handles` finds those of the reference architecture.
        errors: the exception types with which it refuses.
        claims: documented numbers, each a function of the module and the configuration. Known
            names: ``"receptive field"`` and ``"parameter count"``. The number claimed is compared
            with the measured one.
        name: what reports call it; filled in by `load`.
        kind: ``"custom"``; `load` sets ``"stack"`` or ``"block"`` for a class with the contract's
            constructor, which is held to the whole contract.
        constructor: the class of a stack or block.
        twin: a second implementation of a module, with the module's weights; `load` fills it in for
            ``FAST against PLAIN``.
    """

    build: Callable[[Config], nn.Module]
    space: Space = ARCHITECTURES
    call: Callable[[nn.Module, Tensor], Tensor] = _call
    output_shape: Callable[[Config, Shape], Shape] = _same_shape
    receptive_field: Callable[[Config], tuple[int, int]] | None = None
    traits: Traits = field(default_factory=Traits)
    handles: Callable[[nn.Module, Config], tuple[BlockHandles, ...]] | None = None
    errors: tuple[type[Exception], ...] = (ValueError, TypeError)
    claims: Mapping[str, Callable[[nn.Module, Config], int]] = field(default_factory=dict)
    name: str = ""
    kind: str = "custom"
    constructor: type[nn.Module] | None = None
    twin: Callable[[nn.Module, Config], nn.Module] | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.claims) - set(CLAIMS)):
            raise TargetError(f"claims has no {unknown[0]!r}; allowed: {', '.join(CLAIMS)}")

    @property
    def follows_contract(self) -> bool:
        """Whether it is a class held to the whole reference contract."""
        return self.kind in ("stack", "block")

    @property
    def promises_everything(self) -> bool:
        """Whether it promises every configuration, of which only a part is explored by default."""
        return self.space == _EXPLORED.get(self.kind)

    def promises(self, case: Case) -> bool:
        """Whether it promises a case, on whatever device.

        A class held to the contract promises every configuration, a block those of one block.
        """
        if self.follows_contract:
            return not case.options and (self.kind != "block" or case.num_blocks == 1)
        factors = {name: f for name, f in self.space.factors if name != "device"}
        return case in Space(factors, where=self.space.where)

    @property
    def source_files(self) -> frozenset[str]:
        """The files of the target's own code, as tracebacks name them."""
        if self.constructor is None:
            return frozenset({_file_of(self.build), _file_of(self.call)}) - _FOREIGN
        modules = (sys.modules.get(base.__module__) for base in self.constructor.__mro__)
        files = {str(getattr(module, "__file__", "")) for module in modules}
        return frozenset(file for file in files if file not in _FOREIGN)


def _file_of(function: Callable[..., Any]) -> str:
    return getattr(getattr(function, "__code__", None), "co_filename", "")


#: Files in which an exception says nothing about the target.
_FOREIGN = {"", str(nn.modules.module.__file__), __file__}


def load(spec: str) -> Target:
    """The target that ``package.module:Attr`` or ``path/file.py:Attr`` names.

    ``FAST against PLAIN`` is the target PLAIN together with a second implementation: a class or
    `Target` that loads PLAIN's state_dict, or a function from a PLAIN module to a module.

    Raises:
        TargetError: there is no such module or attribute, its import fails, or it is neither a
            `Target` nor a class with the contract's constructor.
    """
    fast, against, plain = spec.partition(AGAINST)
    if against:
        found, twin = load(plain), _find(fast)
        if isinstance(twin, Target) and not twin.traits.direct_convolution:
            found = replace(found, traits=replace(found.traits, direct_convolution=False))
        return replace(found, name=spec, twin=_twin(fast))
    found = _find(spec)
    if isinstance(found, Target):
        return replace(found, name=spec)
    if inspect.isclass(found) and issubclass(found, nn.Module):
        return contract_target(found, spec)
    raise TargetError(
        f"{spec} is {_describe(found)}; it must be a rescnn_verify.Target, or an nn.Module class "
        "whose constructor takes (channels, kernel_sizes, dropout[, num_blocks])"
    )


def _twin(spec: str) -> Callable[[nn.Module, Config], nn.Module]:
    """What makes the second implementation of a module."""
    found = _find(spec)
    if callable(found) and not inspect.isclass(found):
        return lambda model, config: found(copy.deepcopy(model))  # it may change what it is given
    fast = load(spec)

    def build(model: nn.Module, config: Config) -> nn.Module:
        made = fast.build(config).to(next(model.parameters()))  # before it rounds what it loads
        made.load_state_dict(model.state_dict())
        return made

    return build


def _find(spec: str) -> Any:
    place, _, attribute = spec.rpartition(":")
    if not place or not attribute:
        raise TargetError(
            f"target {spec!r} names no attribute; write package.module:Attr or path/file.py:Attr"
        )
    module = _load_file(place) if place.endswith(".py") else _load_module(place)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise TargetError(f"{place} has no {attribute!r}; {_suggestions(module)}")
        found = getattr(found, part)
    return found


def contract_target(cls: type[nn.Module], name: str) -> Target:
    """A class with the contract's constructor, held to the whole reference contract.

    Raises:
        TargetError: its constructor does not take the contract's arguments.
    """
    names, open_ended = _arguments(cls)
    needed = ("channels", "kernel_sizes", "dropout")
    missing = [n for n in needed if n not in names]
    if missing and not open_ended:
        raise TargetError(
            f"the constructor of {name} takes ({', '.join(names)}) and has no "
            f"{' and no '.join(missing)}; a bare class needs (channels, kernel_sizes, dropout[, "
            "num_blocks]); describe another one by a rescnn_verify.Target"
        )
    is_stack = "num_blocks" in names or (missing and _accepts_num_blocks(cls))

    def build(config: Config) -> nn.Module:
        arguments = {"num_blocks": config.num_blocks} if is_stack else {}
        return cls(
            channels=config.channels,
            kernel_sizes=config.kernel_sizes,
            dropout=config.dropout,
            **arguments,
        )

    def field(config: Config) -> tuple[int, int]:
        reach = config.num_blocks * (config.widest // 2)
        return reach, reach

    def claimed_field(model: nn.Module, config: Config) -> int:
        return model.get_receptive_field()  # type: ignore[no-any-return, operator]

    kind = "stack" if is_stack else "block"
    has_claim = is_stack or hasattr(cls, "get_receptive_field")
    return Target(
        build=build,
        space=_EXPLORED[kind],
        receptive_field=field,
        traits=CONTRACT_TRAITS,
        handles=contract_handles,
        claims={"receptive field": claimed_field} if has_claim else {},
        name=name,
        kind=kind,
        constructor=cls,
    )


def _arguments(cls: type[nn.Module]) -> tuple[list[str], bool]:
    """The names that the constructor takes, and whether it takes any others, too.

    A constructor ``(*args, **kwargs)`` hands its arguments on, so those of the next class in the
    method resolution order count, too.
    """
    names: list[str] = []
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        try:
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        except (TypeError, ValueError):
            return names, True
        names += [
            p.name for p in list(parameters)[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names, False
    return names, True


def _accepts_num_blocks(cls: type[nn.Module]) -> bool:
    try:
        cls(channels=2, num_blocks=1, kernel_sizes=(3,), dropout=0.0)
    except TypeError as error:
        return "num_blocks" not in str(error)
    except Exception:
        return True
    return True


def _load_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return _import(name, name)


def _load_file(place: str) -> ModuleType:
    path = Path(place).resolve()
    if not path.is_file():
        raise TargetError(f"there is no file {place}")
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if len(parts) > 1:
        return _import(".".join(parts), place)
    return _import_file(path, place)


def _import_file(path: Path, place: str) -> ModuleType:
    """A file outside any package, as a registered module so that its classes pickle."""
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{place} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with exits_raise():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise TargetError(f"importing {place} failed: {_one_line(error)}") from error
    return module


def _import(name: str, place: str) -> ModuleType:
    try:
        with exits_raise():
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise TargetError(f"importing {place} failed: {_one_line(error)}") from error


def _suggestions(module: ModuleType) -> str:
    found = [
        name
        for name, value in vars(module).items()
        if isinstance(value, Target)
        or (inspect.isclass(value) and issubclass(value, nn.Module) and value is not nn.Module)
    ]
    return f"it has {', '.join(found)}" if found else "it has no Target and no nn.Module class"


def _describe(found: object) -> str:
    kind = "the class" if inspect.isclass(found) else f"a {type(found).__name__}"
    return f"{kind} {getattr(found, '__name__', '')}".strip()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
