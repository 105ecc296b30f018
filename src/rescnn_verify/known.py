"""Known failures: what a run may find without failing, and must find as long as it is listed."""

from __future__ import annotations

import json
import math
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rescnn_verify.campaign import run_units
from rescnn_verify.engine import Search
from rescnn_verify.outcome import FALSIFIED, HELD, NOT_APPLICABLE, NOT_RUN, signature
from rescnn_verify.statement import PropertyError, find_property
from rescnn_verify.unit import Unit
from rescnn_verify.witness import Witness, WitnessError
from rescnn_verify.workers import Crew

__all__ = ["KnownError", "KnownFailure", "examine", "read_baseline", "read_known", "signatures"]

_REQUIRED = ("property", "witness", "reason")
_ALLOWED = (*_REQUIRED, "link", "look_again")


class KnownError(ValueError):
    """A file of known failures, or a baseline, that is not one."""


@dataclass(frozen=True)
class KnownFailure:
    """A failure that is known.

    Args:
        witness: the witness that shows it.
        reason: why it is let through.
        link: where it is followed up.
        look_again: when somebody should.
        where: the file and entry, for messages.
    """

    witness: Witness
    reason: str
    link: str
    look_again: date | None
    where: str

    @property
    def signature(self) -> str:
        """What failures of its kind share."""
        return signature(self.witness.what, self.witness.got)


def read_known(path: Path) -> tuple[KnownFailure, ...]:
    """The known failures of a file with a table ``[[known]]`` for each.

    Raises:
        KnownError: an entry has a mistake: the entry, the key, the value and what is allowed.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise KnownError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KnownError(f"{path} is not TOML: {error}") from error
    entries = data.get("known", [])
    if set(data) - {"known"} or not isinstance(entries, list):
        raise KnownError(f"{path}: write one table [[known]] for each known failure, nothing else")
    return tuple(_entry(path, number, entry) for number, entry in enumerate(entries, 1))


def _entry(path: Path, number: int, entry: Any) -> KnownFailure:
    where = f"{path}, entry {number}"
    if not isinstance(entry, Mapping):
        raise KnownError(f"{where}: write a table [[known]] with {', '.join(_ALLOWED)}")
    if unknown := sorted(set(entry) - set(_ALLOWED)):
        raise KnownError(f"{where}: there is no key {unknown[0]!r}; allowed: {', '.join(_ALLOWED)}")
    for key in _REQUIRED:
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            wrong = (
                f"{key} = {entry[key]!r} must be a text" if key in entry else f"{key} is missing"
            )
            raise KnownError(f"{where}: {wrong}")
    look_again = entry.get("look_again")
    if look_again is not None and type(look_again) is not date:
        raise KnownError(f"{where}: look_again = {look_again!r} must be a date such as 2030-01-31")
    if not isinstance(entry.get("link", ""), str):
        raise KnownError(f"{where}: link = {entry['link']!r} must be a text")
    try:
        find_property(entry["property"])
        witness = Witness.read(path.parent / entry["witness"])
    except PropertyError as error:
        raise KnownError(f"{where}: property = {entry['property']!r}: {error}") from error
    except WitnessError as error:
        raise KnownError(f"{where}: witness = {entry['witness']!r}: {error}") from error
    if witness.name != entry["property"]:
        raise KnownError(
            f"{where}: property = {entry['property']!r}, but its witness is of {witness.name!r}"
        )
    return KnownFailure(witness, entry["reason"], str(entry.get("link", "")), look_again, where)


def read_baseline(path: Path) -> dict[str, tuple[str, ...]]:
    """The signatures of the failures that an earlier run saw, known ones included, by property.

    Args:
        path: the ``--json`` file of that run.

    Raises:
        KnownError: it is no such file.
    """
    try:
        data = json.loads(path.read_text())
        found = [(item["name"], text) for item in data["properties"] for text in item["signatures"]]
    except OSError as error:
        raise KnownError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise KnownError(f"{path} is not the --json file of a run") from error
    return _by_property(found)


def signatures(known: Iterable[KnownFailure]) -> dict[str, tuple[str, ...]]:
    """The signatures of known failures, by property."""
    return _by_property((failure.witness.name, failure.signature) for failure in known)


def _by_property(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    result: dict[str, tuple[str, ...]] = defaultdict(tuple)
    for name, text in pairs:
        result[name] += (text,)
    return dict(result)


def examine(
    known: Sequence[KnownFailure],
    target: str,
    crew: Crew,
    *,
    case_timeout: float,
    until: Callable[[], float] = lambda: math.inf,
) -> list[str]:
    """What is wrong with known failures: those that hold now, or that are not of this target.

    Args:
        known: the failures; the witness of each is run.
        target: the target as it is named, which need not be as the witness names it.
        crew: where they run.
        case_timeout: seconds after which a case is a hang.
        until: as in `run_units`.
    """
    by_tag = {failure.where: failure for failure in known}
    units = (
        Unit(
            failure.witness.name,
            target,
            Search(trials=(failure.witness.trial,)),
            device=failure.witness.case.device,
            case_timeout=case_timeout,
            tag=where,
        )
        for where, failure in by_tag.items()
    )
    complaints = []
    for unit, outcome in run_units(units, crew, until=until):
        failure = by_tag[unit.tag]
        if outcome.verdict == HELD:
            complaints.append(f"{unit.tag}: fixed, remove it: {unit.name} holds for its witness")
        elif outcome.verdict == NOT_RUN:
            continue  # there is no such device here
        elif outcome.verdict == NOT_APPLICABLE:
            complaints.append(
                f"{unit.tag}: matches nothing, remove it: {unit.name} is not applicable "
                f"({outcome.reason})"
            )
        elif outcome.verdict != FALSIFIED:
            complaints.append(
                f"{unit.tag}: its witness could not be run: {outcome.verdict}: {outcome.reason}"
            )
        elif signature(outcome.what, outcome.got) != failure.signature:
            complaints.append(
                f"{unit.tag}: it fails in another way now: {outcome.what}: expected "
                f"{outcome.expected}, got {outcome.got}"
            )
    return sorted(complaints)
