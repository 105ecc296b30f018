"""Spaces and configurations that a person writes, as TOML or as plain data.

The plain data are the TOML's dict. They survive JSON, and that is how a space travels to workers:
its constraints are functions and do not pickle. ``docs/space.md`` says what may be written.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rescnn_verify.case import Config
from rescnn_verify.space import (
    A_CHANNEL_PER_BRANCH,
    INPUTS,
    MORE_THAN_ONE_VALUE_TO_TRAIN,
    Choice,
    Factor,
    Floats,
    Integers,
    Lists,
    Space,
)

__all__ = [
    "SpaceFileError",
    "config_of",
    "neighbourhood",
    "read_config",
    "read_space",
    "read_table",
    "space_of",
]

#: What a configuration leaves out is as in the documented stack.
DOCUMENTED = Config(channels=512, num_blocks=3, kernel_sizes=(3, 5, 7), dropout=0.1)


class SpaceFileError(ValueError):
    """What was written cannot be used: the message says where, what, and what is allowed."""


# --- what may be written -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """What may be written for a factor.

    Args:
        widest: the values that it can have; None for any finite number, string or boolean.
        one: how one value is written, for messages.
        several: how several are written.
    """

    widest: Integers | Floats | Choice | None
    one: str
    several: str

    @property
    def allowed(self) -> str:
        return f"{self.one}, {self.several}"

    def __contains__(self, value: object) -> bool:
        if self.widest is not None:
            return not isinstance(value, bool) and value in self.widest
        if isinstance(value, str):
            return _ends(value) is None  # a range is not one value
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))

    def complaint(self, value: object) -> str:
        """What is wrong with a value that the factor cannot have."""
        numbers = int if isinstance(self.widest, Integers) else int | float
        is_number = isinstance(value, numbers) and not isinstance(value, bool)
        if isinstance(self.widest, Choice) or not is_number:
            return "is not understood"
        return "is out of range"


_LARGEST = 2**63 - 1  # size of a tensor


def _size(least: int, several: str) -> _Rule:
    return _Rule(Integers(least, _LARGEST), f"an integer of at least {least}", several)


def _name(factor: str) -> _Rule:
    names = INPUTS.get(factor)
    assert isinstance(names, Choice)
    return _Rule(names, ", ".join(map(_shown, names.values)), "or a list of these")


def _shown(value: object) -> str:
    """A value as TOML writes it, cut off where it is long."""
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key} = {_shown(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list):
        text = "[" + ", ".join(map(_shown, value)) + "]"
    elif isinstance(value, bool | str):
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_PLAIN = {
    "channels": _size(1, 'a list such as [16, 32], or a range such as "12..40"'),
    "num_blocks": _size(1, 'a list such as [1, 3], or a range such as "1..5"'),
    "dropout": _Rule(
        Floats(0.0, 1.0),
        "a number from 0 to 1",
        'a list such as [0.0, 0.1], or a range such as "0.1..0.5"',
    ),
    "batch": _size(0, 'a list such as [1, 8], or a range such as "0..16"'),
    "length": _size(1, 'a list such as [64, 960], or a range such as "1..100"'),
    "dtype": _name("dtype"),
    "layout": _name("layout"),
    "mode": _name("mode"),
    "seed": _Rule(
        Integers(0, 2**32 - 1),
        f"an integer from 0 to {2**32 - 1}",
        'a list such as [0, 1], or a range such as "0..99"',
    ),
}
_OPTION = _Rule(
    None,
    "a finite number, a string, true or false",
    'a list of them such as [1, 2], or a range such as "1..4"',
)
_KERNEL = _size(1, "")
_BRANCHES = _size(1, 'or a range such as "1..4"')
_KERNEL_LIST = "a list of integers of at least 1 such as [3, 5, 7]"
_KERNEL_LISTS = (
    "a list of kernel lists such as [[3, 5, 7], [3, 3]], or a table such as "
    '{allowed = [1, 3, 5], branches = "1..4"}'
)
_OPTIONS = "the line [option], and below it the target's further arguments as name = value"

_CONFIG_KEYS = ("channels", "num_blocks", "kernel_sizes", "dropout", "option")
_INPUT_KEYS = ("batch", "length", "dtype", "layout", "mode", "seed")
_SPACE_KEYS = (*_CONFIG_KEYS, *_INPUT_KEYS)


@dataclass(frozen=True)
class _Entry:
    """A value as it stands in a file."""

    file: str
    key: str
    given: Any

    def refused(self, complaint: str, allowed: str) -> SpaceFileError:
        shown = _shown(self.given)
        return SpaceFileError(f"{self.file}: {self.key} = {shown} {complaint}; write {allowed}")

    def refused_for(self, value: object, complaint: str, allowed: str) -> SpaceFileError:
        """Refused because of the value itself or one that it contains."""
        has = "" if value is self.given else f"has {_shown(value)}, which "
        return self.refused(f"{has}{complaint}", allowed)

    def checked(self, value: Any, rule: _Rule, allowed: str) -> Any:
        """The entry's value, or one that it contains, as the factor has it."""
        if value not in rule:
            raise self.refused_for(value, rule.complaint(value), allowed)
        return float(value) if isinstance(rule.widest, Floats) else value

    def parts(self) -> dict[str, _Entry]:
        """The entries of a table."""
        return {
            name: _Entry(self.file, f"{self.key}.{name}", given)
            for name, given in self.given.items()
        }


# --- reading -------------------------------------------------------------------------------------


def read_table(path: Path) -> dict[str, Any]:
    """A TOML file as plain data, not looked at any further.

    Raises:
        SpaceFileError: there is no such file, it cannot be read, or it is not TOML.
    """
    try:
        # Some editors put a byte order mark in front, which TOML does not know.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SpaceFileError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise SpaceFileError(f"{path} is a directory; name a TOML file") from None
    except OSError as error:
        raise SpaceFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SpaceFileError(f"{path} is not TOML: it is not UTF-8 text ({error})") from error
    except ValueError as error:  # a TOMLDecodeError, which says the line, or too long a number
        raise SpaceFileError(f"{path} is not TOML: {error}") from error


def read_space(path: Path) -> Space:
    """The space that a TOML file describes.

    Raises:
        SpaceFileError: as `read_table` and `space_of`.
    """
    return space_of(read_table(path), str(path))


def read_config(path: Path) -> Config:
    """The configuration that a TOML file describes.

    Raises:
        SpaceFileError: as `read_table` and `config_of`.
    """
    return config_of(read_table(path), str(path))


def space_of(data: Mapping[str, Any], name: str) -> Space:
    """The space that plain data describe.

    The order of the keys has no meaning; that in a list has: the simplest value comes first.

    Args:
        data: the keys of a space file.
        name: what messages call it.

    Raises:
        SpaceFileError: an unknown key, a value that is not allowed, or no case at all.
    """
    _check_keys(data, name, _SPACE_KEYS, "a space")
    factors: dict[str, Factor] = {}
    for key in (key for key in _SPACE_KEYS if key in data):
        entry = _Entry(name, key, data[key])
        if key == "kernel_sizes":
            factors[key] = _kernels(entry)
        elif key == "option":
            factors |= {e.key: _factor(e, _OPTION) for e in _options(entry)}
        else:
            factors[key] = _factor(entry, _PLAIN[key])
    _check_channels(data, name, factors)
    _check_training(data, name, factors)
    where = []
    if "channels" in factors or "kernel_sizes" in factors:
        where.append(A_CHANNEL_PER_BRANCH)
    if "mode" in factors and "train" in factors["mode"]:
        where.append(MORE_THAN_ONE_VALUE_TO_TRAIN)
    return Space(factors, where=tuple(where))


def config_of(data: Mapping[str, Any], name: str) -> Config:
    """The configuration that plain data describe; what they leave out is the documented stack's.

    Args:
        data: channels, num_blocks, kernel_sizes (one list), dropout, and the table option.
        name: what messages call it.

    Raises:
        SpaceFileError: an unknown key, a value that is not allowed, or fewer channels than kernels.
    """
    _check_keys(data, name, _CONFIG_KEYS, "a configuration")
    values = dict(vars(DOCUMENTED))
    for key, given in data.items():
        entry = _Entry(name, key, given)
        if key == "kernel_sizes":
            values[key] = _kernel_list(entry, given, _KERNEL_LIST)
        elif key == "option":
            values["options"] = tuple(
                (e.key.removeprefix("option."), e.checked(e.given, _OPTION, _OPTION.one))
                for e in _options(entry)
            )
        else:
            values[key] = entry.checked(given, _PLAIN[key], _PLAIN[key].one)
    config = Config(**values)
    written = {"channels": config.channels, "kernel_sizes": list(config.kernel_sizes)}
    _check_channels(
        written,
        name,
        {"channels": Choice(config.channels), "kernel_sizes": Choice(config.kernel_sizes)},
    )
    return config


# --- a configuration's neighbours ----------------------------------------------------------------


def neighbourhood(config: Config) -> Space:
    """A configuration and what is one step away from it in each factor: the product of these.

    One channel or block more or fewer; the kernels reversed, without one of the branches, or with
    one of them repeated; a dropout of 0 and of 1. As it is the product, several factors may be a
    step away at once. The options are the configuration's own, and inputs are left free. Each
    factor has the configuration's own value first, as the simplest: counterexamples shrink to it,
    in a product of spaces where this one stands on the left.

    Args:
        config: a configuration with at least one channel for each branch.
    """
    kernels, branches = config.kernel_sizes, config.branches
    fewer = [kernels[:i] + kernels[i + 1 :] for i in range(branches)] if branches > 1 else []
    more = [kernels[:i] + kernels[i - 1 :] for i in range(1, branches + 1)]
    return Space(
        {
            "channels": _around(config.channels, least=branches),
            "num_blocks": _around(config.num_blocks, least=1),
            "kernel_sizes": _each(kernels, kernels[::-1], *fewer, *more),
            "dropout": _each(config.dropout, 0.0, 1.0),
        }
        | {f"option.{name}": Choice(value) for name, value in config.options},
        where=(A_CHANNEL_PER_BRANCH,),  # one branch more may be one too many
    )


def _around(number: int, least: int) -> Choice:
    return Choice(*(n for n in (number, number - 1, number + 1) if n >= least))


def _each(*values: Any) -> Choice:
    return Choice(*dict.fromkeys(values))


# --- values --------------------------------------------------------------------------------------


def _factor(entry: _Entry, rule: _Rule) -> Integers | Floats | Choice:
    """What one value, a list of values or a range stands for."""
    if isinstance(entry.given, list):
        values = [entry.checked(value, rule, rule.allowed) for value in entry.given]
        return _distinct(entry, values, rule.allowed)
    return _range(entry, rule) or Choice(entry.checked(entry.given, rule, rule.allowed))


def _range(entry: _Entry, rule: _Rule) -> Integers | Floats | None:
    """What a range stands for, None where nothing like one is written."""
    if (ends := _ends(entry.given)) is None:
        return None
    low, high = (entry.checked(end, rule, rule.allowed) for end in ends)
    if low > high:
        raise entry.refused(f"goes down from {low} to {high}", rule.allowed)
    return Floats(low, high) if isinstance(low, float) else Integers(low, high)


def _ends(text: object) -> tuple[float, float] | None:
    """Both ends of a range ``"a..b"``, integers if both can be."""
    low, _, high = text.partition("..") if isinstance(text, str) else ("", "", "")
    for number in (int, float):
        try:
            return number(low), number(high)
        except ValueError:
            continue
    return None


def _distinct(entry: _Entry, values: Sequence[Any], allowed: str) -> Choice:
    """The values of a list, of which there is at least one and none twice."""
    if not values:
        raise entry.refused("is empty", allowed)
    for i, value in enumerate(values):
        if value in values[:i]:  # it would be drawn more often, and counted twice in a sweep
            one, other = entry.given[values.index(value)], entry.given[i]
            raise entry.refused(f"has {_shown(one)} and {_shown(other)}, which are equal", allowed)
    return Choice(*values)


def _kernels(entry: _Entry) -> Choice | Lists:
    if isinstance(entry.given, Mapping):
        return _kernel_table(entry)
    if not isinstance(entry.given, list):
        raise entry.refused("is not understood", _KERNEL_LISTS)
    if entry.given and all(kernel in _KERNEL for kernel in entry.given):
        raise entry.refused("is one kernel list", f"[{_shown(entry.given)}], or {_KERNEL_LISTS}")
    lists = [_kernel_list(entry, kernels, _KERNEL_LISTS) for kernels in entry.given]
    return _distinct(entry, lists, _KERNEL_LISTS)


def _kernel_list(entry: _Entry, kernels: object, allowed: str) -> tuple[int, ...]:
    if not isinstance(kernels, list):
        raise entry.refused_for(kernels, "is not a list", allowed)
    if not kernels:
        raise entry.refused_for(kernels, "is empty", allowed)
    return tuple(entry.checked(kernel, _KERNEL, allowed) for kernel in kernels)


def _kernel_table(entry: _Entry) -> Lists:
    parts = entry.parts()
    if set(parts) != {"allowed", "branches"}:
        raise entry.refused("must name allowed and branches and nothing else", _KERNEL_LISTS)
    allowed = parts["allowed"]
    if not isinstance(allowed.given, list):
        raise allowed.refused("is not understood", _KERNEL_LIST)
    sizes = [allowed.checked(size, _KERNEL, _KERNEL_LIST) for size in allowed.given]
    return Lists(_distinct(allowed, sizes, _KERNEL_LIST), *_branches(parts["branches"]))


def _branches(entry: _Entry) -> tuple[int, int]:
    count = _range(entry, _BRANCHES)
    if isinstance(count, Integers):
        return count.low, count.high
    number = entry.checked(entry.given, _BRANCHES, _BRANCHES.allowed)
    return number, number


def _options(entry: _Entry) -> list[_Entry]:
    """The entries of the table of options, by name."""
    if not isinstance(entry.given, Mapping):
        raise entry.refused("is not a table", _OPTIONS)
    for name, part in entry.parts().items():
        if name in _SPACE_KEYS:  # TOML takes all that follows [option] to belong to it
            raise part.refused("is below [option]", f"{name} above the line [option]")
    return [part for _, part in sorted(entry.parts().items())]


# --- checks --------------------------------------------------------------------------------------


def _check_keys(data: Mapping[str, Any], name: str, allowed: tuple[str, ...], what: str) -> None:
    for key in (key for key in data if key not in allowed):
        if key == "device":
            hint = "; the command line gives it: --device"
        else:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"; did you mean {close[0]}?" if close else ";"
            hint += f" allowed: {', '.join(allowed)}"
        raise SpaceFileError(f"{name}: {key} = {_shown(data[key])} is not a key of {what}{hint}")


def _check_channels(data: Mapping[str, Any], name: str, factors: Mapping[str, Factor]) -> None:
    """That every kernel list has a case: as many channels as kernels."""
    kernels, channels = factors.get("kernel_sizes"), factors.get("channels")
    if kernels is None or channels is None:
        return
    longest, most = _most(kernels), _most(channels)
    if longest > most:
        raise _Entry(name, "kernel_sizes", data["kernel_sizes"]).refused(
            f"has a list of {longest} kernels, which needs at least {longest} channels, and "
            f"channels = {_shown(data['channels'])}",
            f"at most {most} kernels in a list or allow at least {longest} channels",
        )


def _check_training(data: Mapping[str, Any], name: str, factors: Mapping[str, Factor]) -> None:
    """That a space that only trains has a case: more than one value per channel."""
    if factors.get("mode") != Choice("train"):
        return
    sizes = {key: _most(factors[key]) for key in ("batch", "length") if key in factors}
    if sizes.get("batch", 2) * sizes.get("length", 2) <= 1:
        written = " and ".join(f"{key} = {_shown(data[key])}" for key in sizes)
        raise _Entry(name, "mode", data["mode"]).refused(
            f"needs more than one value per channel, and there is {written}",
            '"eval", or allow a larger batch or length',
        )


def _most(factor: Factor) -> int:
    """The largest value of a factor; of kernel lists, the largest number of kernels."""
    if isinstance(factor, Choice):
        return max(len(v) if isinstance(v, tuple) else v for v in factor.values)
    return int(factor.high)
