"""The corpus: cases worth running first, one small file each, named by what it holds.

Corpora are merged by copying their files into one folder, and campaigns may share one: equal cases
have equal names, and files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rescnn_verify.case import Case, CaseError
from rescnn_verify.files import write_whole

__all__ = ["Corpus", "CorpusError", "Kept", "folder_of"]

VERSION = 1

#: How many cases of a property are kept, by why they are.
LIMITS = {"failed": 16, "tight": 4, "corner": 16}


class CorpusError(ValueError):
    """A location that cannot hold a corpus, or a file that is not of one."""


@dataclass(frozen=True)
class Kept:
    """A trial that was kept.

    Args:
        name: the property.
        trial: its cases, to be run in order on one built model.
        why: ``"failed"``, ``"tight"`` (closest to a bound) or ``"corner"`` (a rare combination).
        ratio: the error over its bound, of a tight one.
    """

    name: str
    trial: tuple[Case, ...]
    why: str
    ratio: float = 0.0

    @property
    def filename(self) -> str:
        """The name of its file: the property and a hash of its cases."""
        text = "".join(case.dumps() for case in self.trial)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"

    def dumps(self) -> str:
        """The file's text."""
        body = {
            "version": VERSION,
            "property": self.name,
            "why": self.why,
            "ratio": self.ratio,
            "trial": [case.to_json() for case in self.trial],
        }
        return json.dumps(body, indent=1, allow_nan=False) + "\n"

    @classmethod
    def loads(cls, text: str) -> Kept:
        """The kept trial in a file's text.

        Raises:
            CorpusError: it holds something else.
        """
        try:
            data = json.loads(text)
            if data["version"] != VERSION or data["why"] not in LIMITS:
                raise CorpusError(f"it is not a kept case of version {VERSION}")
            trial = tuple(Case.from_json(item) for item in data["trial"])
            kept = cls(str(data["property"]), trial, data["why"], float(data["ratio"]))
        except KeyError as error:
            raise CorpusError(f"it has no {error.args[0]!r}") from error
        except (CaseError, TypeError, ValueError, RecursionError) as error:
            raise CorpusError(str(error)) from error
        if not trial:
            raise CorpusError("its trial is empty")
        return kept


def folder_of(location: str) -> Any:
    """The folder at a location: a path, or a URL that ``fsspec`` understands.

    Raises:
        CorpusError: it is a URL, and the extra that reads URLs is not installed or has no such
            protocol.
    """
    if "://" not in location:
        return Path(location)
    try:
        from upath import UPath

        return UPath(location)
    except ImportError as error:
        raise CorpusError(
            f"--corpus {location}: a URL needs the extra: pip install 'rescnn-verify[remote]' "
            f"({error})"
        ) from error
    except ValueError as error:
        raise CorpusError(f"--corpus {location}: {error}") from error


@dataclass
class Corpus:
    """The kept cases of a folder.

    Args:
        folder: a `Path`, or what behaves like one.
        kept: what it held when it was read and what was added since, by property.
        unreadable: what is wrong with which of its files; they are left as they are.
    """

    folder: Any
    kept: dict[str, list[Kept]] = field(default_factory=lambda: defaultdict(list))
    unreadable: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Any) -> Corpus:
        """The corpus of a folder, which is made if need be.

        Raises:
            CorpusError: it cannot be made or listed.
        """
        corpus = cls(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths = sorted((p for p in folder.iterdir() if p.suffix == ".json"), key=str)
        except OSError as error:
            raise CorpusError(f"corpus {folder}: {error.strerror or error}") from error
        except Exception as error:  # of whatever library reads this kind of URL
            raise CorpusError(f"corpus {folder}: {type(error).__name__}: {error}") from error
        for path in paths:
            try:
                entry = Kept.loads(path.read_text())
                corpus.kept[entry.name].append(entry)
            except FileNotFoundError:
                continue  # another campaign has just removed it
            except (OSError, UnicodeDecodeError, CorpusError) as error:
                corpus.unreadable.append(f"{path}: {error}")
        return corpus

    def trials(self) -> Mapping[str, tuple[tuple[Case, ...], ...]]:
        """The kept trials of each property, those that failed first."""
        order = list(LIMITS)
        return {
            name: tuple(e.trial for e in sorted(entries, key=lambda e: order.index(e.why)))
            for name, entries in self.kept.items()
        }

    def add(self, entry: Kept) -> bool:
        """Keeps a trial unless there are enough of its kind already; whether it was kept.

        Raises:
            OSError: it cannot be written.
        """
        loosest = None
        alike = [e for e in self.kept[entry.name] if e.why == entry.why]
        if any(e.filename == entry.filename for e in self.kept[entry.name]):
            return False
        if len(alike) >= LIMITS[entry.why]:
            loosest = min(alike, key=lambda e: e.ratio)
            if entry.why != "tight" or entry.ratio <= loosest.ratio:
                return False
        write_whole(self.folder / entry.filename, entry.dumps())
        self.kept[entry.name].append(entry)
        if loosest is not None:
            (self.folder / loosest.filename).unlink(missing_ok=True)
            self.kept[entry.name].remove(loosest)
        return True

    def __iter__(self) -> Iterator[Kept]:
        return (entry for entries in self.kept.values() for entry in entries)

    def __len__(self) -> int:
        return sum(map(len, self.kept.values()))
