"""Witnesses: falsifications as JSON files that say how to see them again."""

from __future__ import annotations

import glob
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch

from rescnn_verify import __version__
from rescnn_verify.case import Case, CaseError
from rescnn_verify.compare import Falsified, NotApplicable
from rescnn_verify.exits import exits_raise
from rescnn_verify.files import write_whole
from rescnn_verify.statement import find_property
from rescnn_verify.subject import environment
from rescnn_verify.target import load
from rescnn_verify.trial import run_trial

__all__ = ["Witness", "WitnessError", "find_witnesses", "replay", "reproduce", "versions"]

VERSION = 1


class WitnessError(ValueError):
    """A file that is not a witness, or one that cannot be run here."""


@dataclass(frozen=True)
class Witness:
    """A case for which a property was false.

    Args:
        name: the property's name.
        target: the target as it was named on the command line.
        trial: the cases run on one built model, in order; the last one falsifies. There is more
            than one only if the model has to remember the ones before.
        what, expected, got: the comparison that failed.
        alone: whether it ends its process, so that it has to be run in one of its own.
    """

    name: str
    target: str
    trial: tuple[Case, ...]
    what: str
    expected: str
    got: str
    alone: bool = False

    @property
    def case(self) -> Case:
        return self.trial[-1]

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "property": self.name,
            "target": self.target,
            "case": self.case.to_json(),
            "before": [case.to_json() for case in self.trial[:-1]],
            "what": self.what,
            "expected": self.expected,
            "got": self.got,
            "alone": self.alone,
            "versions": versions(),
        }

    @property
    def filename(self) -> str:
        text = self.name + self.target + "".join(case.dumps() for case in self.trial)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"

    def write(self, folder: Path) -> Path:
        """Writes the witness into a folder, making it if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.filename
        write_whole(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Witness:
        """The witness in a file.

        Raises:
            WitnessError: there is no such file, or it holds something else.
        """
        try:
            data = json.loads(path.read_text())
        except OSError as error:
            raise WitnessError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise WitnessError(f"{path} is not JSON: {error}") from error
        if not isinstance(data, Mapping) or data.get("version") != VERSION:
            raise WitnessError(f"{path} is not a witness of version {VERSION}")
        try:
            trial = tuple(Case.from_json(item) for item in (*data["before"], data["case"]))
            name = str(data["property"])
            texts = {key: str(data[key]) for key in ("target", "what", "expected", "got")}
        except KeyError as error:
            raise WitnessError(f"{path} has no {error.args[0]!r}") from error
        except (CaseError, TypeError) as error:
            raise WitnessError(f"{path}: {error}") from error
        return cls(name=name, trial=trial, alone=bool(data.get("alone", False)), **texts)

    def script(self) -> str:
        """A Python script that says whether the witness is reproduced.

        It finds the target from the folder where it lies. Exit codes: 1 reproduced, 0 not, 2 it
        could not run.
        """
        lines = self.python().splitlines()
        return "\n".join(
            [
                repr(f"{self.name} is false of {self.target}: {self.what}"),
                "",
                "import os",
                "import sys",
                "import traceback",
                "",
                "from rescnn_verify.compare import Falsified",
                lines[0],
                "",
                "os.chdir(os.path.dirname(os.path.abspath(__file__)))",
                "try:",
                f"    {lines[1]}",
                "except Falsified as falsified:",
                "    sys.exit(str(falsified))",
                "except Exception:",
                "    traceback.print_exc()",
                "    sys.exit(2)",
                'print("not reproduced")',
            ]
        )

    def python(self) -> str:
        """Lines of plain Python that raise `Falsified` again."""
        usual = Case().to_json() | {"version": None}
        cases = ", ".join(
            repr({key: value for key, value in case.to_json().items() if value != usual[key]})
            for case in self.trial
        )
        return (
            "from rescnn_verify.witness import reproduce\n"
            f"reproduce({self.name!r}, {self.target!r}, {cases})"
        )


def reproduce(name: str, target: str, *cases: Mapping[str, Any]) -> None:
    """Runs a property on cases given as their JSON form, on one built model.

    Raises:
        Falsified: the property is false of the target for the last case.
        WitnessError, PropertyError, TargetError, CaseError: it could not be run.
    """
    prop, loaded = find_property(name), load(target)
    trial = tuple(Case.from_json(case) for case in cases)
    if missing := prop.missing(loaded):
        raise WitnessError(f"{name} does not apply to {target}: {missing}")
    for case in trial:
        if not loaded.promises(case):
            raise WitnessError(f"{target} does not promise {case}")
    if any(case.device == "cuda" for case in trial) and not torch.cuda.is_available():
        raise WitnessError(f"{name}: the case needs a CUDA device, and there is none")
    try:
        with environment(), exits_raise():
            run_trial(prop, loaded, trial)
    except NotApplicable as reason:
        raise WitnessError(f"{name} does not apply to {target}: {reason}") from reason


def find_witnesses(place: str, folder: Path) -> list[Path]:
    """The files of the witnesses at a place: a file, all of a folder, or one named by its ID.

    Args:
        place: a path, or the ID at the end of a witness's file name.
        folder: where an ID is looked for.

    Raises:
        WitnessError: there is none.
    """
    path = Path(place)
    if path.is_dir():
        paths = sorted(path.glob("*.json"))
        if not paths:
            raise WitnessError(f"there is no witness in the folder {place}")
    elif path.exists() or path.suffix == ".json" or path.parent != Path():
        paths = [path]
    else:
        paths = sorted(folder.glob(f"*-{glob.escape(place)}*.json"))
        if not paths:
            raise WitnessError(f"{place} is no file, no folder and no ID of a witness in {folder}")
        if len(paths) > 1:
            found = ", ".join(str(path) for path in paths)
            raise WitnessError(f"{place} is the ID of several witnesses; name one: {found}")
    return paths


def replay(witness: Witness) -> Falsified | None:
    """The falsification that a witness shows now, None when the property holds for it."""
    try:
        reproduce(witness.name, witness.target, *(case.to_json() for case in witness.trial))
    except Falsified as falsified:
        return falsified
    return None


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "rescnn-verify": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "hypothesis": version("hypothesis"),
    }
