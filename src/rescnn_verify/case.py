"""A case: everything a property needs to know, as one small immutable value.

Data are never part of a case; they are derived from its seed by `Case.rng`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

__all__ = ["Case", "CaseError", "Config"]

VERSION = 1

# Integers of an architecture are `Any` below because the invalid ones are cases, too.


class CaseError(ValueError):
    """A JSON value that is not a case: the message says what is wrong with it."""


@dataclass(frozen=True)
class Config:
    """An architecture configuration.

    Args:
        channels: channels of the input and the output.
        num_blocks: residual blocks in the stack (1 for a bare block).
        kernel_sizes: one kernel size for each branch, in order.
        dropout: probability of zeroing a channel.
        options: further arguments of a target that has them, as sorted (name, value) pairs.
    """

    channels: Any = 4
    num_blocks: Any = 1
    kernel_sizes: tuple[Any, ...] = (3,)
    dropout: Any = 0.0
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def branches(self) -> int:
        return len(self.kernel_sizes)

    @property
    def widest(self) -> int:
        """The widest kernel."""
        return int(max(self.kernel_sizes))

    @property
    def field(self) -> int:
        """The receptive field by the contract: 1 + num_blocks · (widest kernel − 1)."""
        return 1 + int(self.num_blocks) * (self.widest - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """The branch widths by the contract: channels // n each, the remainder to the last."""
        each = self.channels // self.branches
        return (each,) * (self.branches - 1) + (self.channels - each * (self.branches - 1),)

    def describe(self) -> str:
        """The arguments as a person would write them."""
        parts = [f"channels={self.channels!r}", f"kernel_sizes={list(self.kernel_sizes)}"]
        parts += [f"num_blocks={self.num_blocks!r}", f"dropout={self.dropout!r}"]
        return ", ".join(parts + [f"{key}={value!r}" for key, value in self.options])

    def option(self, name: str) -> Any:
        """The value of a target's further argument ``name``."""
        return dict(self.options)[name]


@dataclass(frozen=True)
class Case(Config):
    """A configuration together with one input and a seed.

    Args:
        batch, length: the input's other two dimensions.
        dtype: ``"float64"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        device: ``"cpu"`` or ``"cuda"``.
        layout: memory layout of the input: contiguous, transposed, strided or expanded.
        mode: ``"eval"`` or ``"train"``.
        seed: all data of the case derive from it.
        extra: what else the property names, as sorted (name, value) pairs.
    """

    batch: int = 1
    length: int = 8
    dtype: str = "float32"
    device: str = "cpu"
    layout: str = "contiguous"
    mode: str = "eval"
    seed: int = 0
    extra: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, name: str) -> Any:
        """The value of a factor named by the property: ``case["magnitude"]``."""
        return dict(self.extra)[name]

    @functools.cached_property
    def config(self) -> Config:
        return Config(**{f.name: getattr(self, f.name) for f in fields(Config)})

    @property
    def shape(self) -> tuple[int, int, int]:
        """The input's shape (batch, channels, length)."""
        return (self.batch, int(self.channels), self.length)

    def rng(self, purpose: str) -> np.random.Generator:
        """A NumPy generator for one purpose: other purposes do not shift its numbers."""
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little"))

    def to_json(self) -> dict[str, Any]:
        """The canonical JSON form, every field named; NaN and infinities are tagged."""
        body = {f.name: _encode(getattr(self, f.name)) for f in fields(self)}
        for name in ("options", "extra"):
            body[name] = {key: _encode(value) for key, value in getattr(self, name)}
        return {"version": VERSION, **body}

    @classmethod
    def from_json(cls, data: Any) -> Case:
        """The case of a JSON object as `to_json` gives it; fields left out take their defaults.

        Raises:
            CaseError: an unknown version or field, or a value of the wrong kind.
        """
        if not isinstance(data, Mapping):
            raise CaseError(f"a case is a JSON object, not {type(data).__name__}")
        if data.get("version") != VERSION:
            raise CaseError(
                f"case version {data.get('version')!r} is not known; allowed: {VERSION}"
            )
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - names - {"version"}):
            raise CaseError(f"a case has no field {unknown[0]!r}; allowed: {sorted(names)}")
        pairs = ("options", "extra")
        values = {key: _decode(data[key]) for key in names & set(data) if key not in pairs}
        for name in pairs:
            if not isinstance(named := data.get(name, {}), Mapping):
                raise CaseError(f"{name} must be a JSON object, got {named!r}")
            values[name] = tuple(sorted((key, _decode(item)) for key, item in named.items()))
        for name in ("batch", "length", "seed"):
            value = values.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise CaseError(f"{name} must be an integer of at least 0, got {value!r}")
        for name in ("dtype", "device", "layout", "mode"):
            if name in values and not isinstance(values[name], str):
                raise CaseError(f"{name} must be a string, got {values[name]!r}")
        if not isinstance(values.get("kernel_sizes", ()), tuple):
            raise CaseError(f"kernel_sizes must be a list, got {data['kernel_sizes']!r}")
        return cls(**values)

    def dumps(self) -> str:
        """The canonical text: equal cases, equal text."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def __str__(self) -> str:
        """The configuration, then what it is run on, as a person would say it."""
        parts = [self.describe()]
        parts += [f"batch={self.batch}", f"length={self.length}", self.dtype, self.mode]
        parts += [self.layout] if self.layout != "contiguous" else []
        parts += [self.device] if self.device != "cpu" else []
        parts += [f"{key}={value!r}" for key, value in self.extra]
        return ", ".join([*parts, f"seed={self.seed}"])


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"float"}:
            try:
                return float(value["float"])
            except (TypeError, ValueError):
                raise CaseError(f"not a tagged float: {dict(value)!r}") from None
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    return value
