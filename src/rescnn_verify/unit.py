"""A unit of work: one search for one property, as JSON, so that any executor can run it."""

from __future__ import annotations

import functools
import json
import math
import os
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rescnn_verify.case import Case
from rescnn_verify.engine import Search, search_property
from rescnn_verify.enumeration import values_of
from rescnn_verify.journal import Journal
from rescnn_verify.outcome import BAD_TARGET, INTERNAL_ERROR, NOT_APPLICABLE, Outcome
from rescnn_verify.space import Choice, Lists, Space, SpaceError
from rescnn_verify.spacefile import config_of, neighbourhood, space_of
from rescnn_verify.statement import all_properties, find_property
from rescnn_verify.target import Target, TargetError, load

__all__ = ["Unit", "confined", "failed", "run_unit", "target_of"]


@dataclass(frozen=True)
class Unit:
    """A property, its target, and where its cases come from.

    Args:
        name: the property.
        target: the target as the user names it.
        search: where cases come from.
        seed: sampled and drawn cases are a function of it.
        device: ``"cpu"`` or ``"cuda"``.
        space: the user's own space, as the data of a space file; None: all that is promised.
        journal: the file where each case is written before it runs.
        case_timeout: seconds after which a case ends its process; 0: never.
        tag: what the campaign calls it.
    """

    name: str
    target: str
    search: Search
    seed: int = 0
    device: str = "cpu"
    space: Mapping[str, Any] | None = None
    journal: str | None = None
    case_timeout: float = 0.0
    tag: str = ""

    def dumps(self) -> str:
        """The unit as JSON text."""
        search = vars(self.search) | {
            "trials": [[case.to_json() for case in trial] for trial in self.search.trials],
            "last": [[case.to_json() for case in trial] for trial in self.search.last],
            "configs": [Case(**vars(config)).to_json() for config in self.search.configs],
        }
        finite = {key: None if item == math.inf else item for key, item in search.items()}
        return json.dumps(vars(self) | {"search": finite}, allow_nan=False)

    @classmethod
    def loads(cls, text: str) -> Unit:
        """The unit of a JSON text as `dumps` gives it."""
        data = json.loads(text)
        search = data["search"]
        given = {
            "trials": tuple(tuple(map(Case.from_json, trial)) for trial in search["trials"]),
            "last": tuple(tuple(map(Case.from_json, trial)) for trial in search["last"]),
            "configs": tuple(Case.from_json(item).config for item in search["configs"]),
            "seconds": _time(search["seconds"]),
            "shrinking": _time(search["shrinking"]),
            "shard": tuple(search["shard"]),
            "known": tuple(search["known"]),
        }
        return cls(**{**data, "search": Search(**{**search, **given})})


def run_unit(text: str) -> str:
    """Runs a unit given as JSON, and returns its outcome as JSON: what workers do."""
    unit = Unit.loads(text)
    try:
        return json.dumps(_run(unit).to_json(), allow_nan=False)
    except SpaceError as error:
        outcome = _nothing(unit, NOT_APPLICABLE, str(error))
    except TargetError as error:
        outcome = _nothing(unit, BAD_TARGET, str(error))
    except Exception:
        outcome = failed(unit, traceback.format_exc())
    return json.dumps(outcome.to_json(), allow_nan=False)


def _run(unit: Unit) -> Outcome:
    target = target_of(unit.target, unit.space)
    with ExitStack() as stack:
        journal = None
        if unit.journal or unit.case_timeout:
            path = Path(unit.journal or os.devnull)  # where there is none, it still keeps the time
            journal = stack.enter_context(Journal.open(path, unit.case_timeout))
        return search_property(
            find_property(unit.name),
            target,
            unit.search,
            seed=unit.seed,
            device=unit.device,
            journal=journal,
        )


def failed(unit: Unit, reason: str) -> Outcome:
    """The outcome of a unit that could not be run by a mistake that is not the target's."""
    return _nothing(unit, INTERNAL_ERROR, reason)


def _nothing(unit: Unit, verdict: str, reason: str) -> Outcome:
    evidence = next((p.evidence for p in all_properties() if p.name == unit.name), "")
    return Outcome(unit.name, verdict, evidence, unit.device, reason=reason)


def _time(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def target_of(spec: str, space: Mapping[str, Any] | None = None) -> Target:
    """A target, held to the user's own space if there is one.

    Args:
        spec: the target as the user names it.
        space: ``{"space": …}`` with the data of a space file, or ``{"near": …}`` with those of a
            configuration, which stands for its neighbourhood.

    Raises:
        TargetError, SpaceFileError: one of them cannot be read.
        SpaceError: the target promises nothing there.
    """
    return _target_of(spec, json.dumps(space))


@functools.lru_cache(maxsize=4)
def _target_of(spec: str, space: str) -> Target:
    target, data = load(spec), json.loads(space)
    if data is None:
        return target
    if "near" in data:
        config = config_of(data["near"], "--config")
        if target.kind == "block":
            config = replace(config, num_blocks=1)
        return confined(target, neighbourhood(config))
    return confined(target, space_of(data["space"], "--space"))


def confined(target: Target, space: Space) -> Target:
    """A target within a space.

    A class with the contract's constructor promises every configuration, so the space replaces
    what is explored by default; any other target keeps to its own space.

    Raises:
        SpaceError: a target with a space of its own promises nothing there, or there are kernels
            that the contract lets an implementation refuse.
    """
    promised = target.space
    if target.follows_contract and (even := _even_kernel(space)):
        raise SpaceError(
            f"kernel_sizes: {even} is even, which the contract lets an implementation refuse; "
            "leave it out, or promise it by a rescnn_verify.Target"
        )
    options = {name for name, _ in space.factors if name.startswith("option.")}
    if unknown := sorted(options - {name for name, _ in promised.factors}):
        raise SpaceError(f"{unknown[0]}: the target's own space names no such option")
    if target.follows_contract:
        fixed = {"num_blocks"} if target.kind == "block" else set()
        kept = {n: f for n, f in promised.factors if n in fixed or not space.get(n)}
        promised = Space(kept, where=promised.where)
    return replace(target, space=space * promised)


def _even_kernel(space: Space) -> int | None:
    """An even kernel size of a space, None if there is none."""
    factor = space.get("kernel_sizes")
    if isinstance(factor, Lists):
        sizes = values_of("kernel_sizes", factor.element)
    elif isinstance(factor, Choice):
        sizes = (size for kernels in factor.values for size in kernels)
    else:
        return None
    return next((size for size in sizes if size % 2 == 0), None)
