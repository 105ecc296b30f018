"""The pytest plugin: ``pytest properties --target package.module:Attr``.

Every property is a test item of the module that states it. Importing the plugin imports neither
torch nor Hypothesis.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rescnn_verify.bench import HOWS

if TYPE_CHECKING:
    from rescnn_verify.statement import Property
    from rescnn_verify.target import Target
    from rescnn_verify.unit import Unit

pytest_plugins = ["rescnn_verify.bench.fixture"]

_PROPERTIES = "rescnn_verify.properties"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rescnn-verify")
    group.addoption(
        "--target",
        metavar="TARGET",
        default="rescnn:ResCNNStack",
        help="the implementation to check: package.module:Attr or path/file.py:Attr",
    )
    group.addoption(
        "--verify-profile",
        choices=("quick", "default", "thorough"),
        default="default",
        help="how long to search",
    )
    group.addoption("--verify-seed", type=int, default=0, help="another seed tries other cases")
    group.addoption(
        "--verify-device",
        choices=("cpu", "cuda", "all"),
        default="cpu",
        help="where the models run; without a CUDA device its checks are skipped as not run",
    )
    group.addoption(
        "--verify-require-cuda", action="store_true", help="fail unless there is a CUDA device"
    )
    group.addoption(
        "--bench-space", metavar="FILE.toml", help="time the cases of this space; see docs/space.md"
    )
    group.addoption(
        "--bench-how",
        action="append",
        choices=HOWS,
        help="run the model as it is, compiled, or from a CUDA graph; may be given several times",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    if not any("properties" in str(argument) for argument in config.args):
        return None
    import torch

    return (
        f"target: {config.getoption('--target')}, profile {config.getoption('--verify-profile')}, "
        f"seed {config.getoption('--verify-seed')}, {config.getoption('--verify-device')}, "
        f"torch {torch.__version__}"
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    package = file_path.parent / "__init__.py"
    if file_path.stem.startswith(("_", "conftest")) or not package.is_file():
        return None
    properties = find_spec(_PROPERTIES)
    if properties is None or properties.origin is None or not package.samefile(properties.origin):
        return None
    return PropertyFile.from_parent(parent, path=file_path)


def pytest_collection_finish(session: pytest.Session) -> None:
    if mistake := session.config.stash.get(_MISTAKE, None):  # said once, not for every file
        raise pytest.UsageError(mistake)


class PropertyFile(pytest.File):
    """A module of the properties folder."""

    def collect(self) -> Iterator[pytest.Item]:
        import torch

        from rescnn_verify.campaign import Plan
        from rescnn_verify.statement import all_properties
        from rescnn_verify.target import TargetError

        try:
            _target(self.config)
        except TargetError as error:
            self.config.stash[_MISTAKE] = f"--target: {error}"
            return
        if self.config.getoption("--verify-require-cuda") and not torch.cuda.is_available():
            self.config.stash[_MISTAKE] = "--verify-require-cuda: no CUDA device"
            return

        properties = tuple(p.name for p in all_properties() if p.family == self.path.stem)
        chosen = self.config.getoption("--verify-device")
        devices = ("cpu", "cuda") if chosen == "all" else (chosen,)
        plan = Plan(
            self.config.getoption("--target"),
            properties,
            profile=self.config.getoption("--verify-profile"),
            seed=self.config.getoption("--verify-seed"),
            devices=devices,
        )
        for unit in plan.units:
            name = unit.name.partition(".")[2]
            suffix = f"[{unit.device}]" if len(devices) > 1 else ""
            yield PropertyItem.from_parent(self, name=name + suffix, unit=unit)


class PropertyItem(pytest.Item):
    """One property, checked against the target of the command line."""

    def __init__(self, *, unit: Unit, **rest: Any) -> None:
        super().__init__(**rest)
        self.unit = unit

    @property
    def prop(self) -> Property:
        from rescnn_verify.statement import find_property

        return find_property(self.unit.name)

    def runtest(self) -> None:
        from rescnn_verify.engine import search_property
        from rescnn_verify.outcome import HELD, NOT_APPLICABLE, NOT_RUN

        outcome = search_property(
            self.prop,
            _target(self.config),
            self.unit.search,
            seed=self.unit.seed,
            device=self.unit.device,
        )
        if outcome.verdict in (NOT_APPLICABLE, NOT_RUN):
            pytest.skip(f"{outcome.verdict}: {outcome.reason}")
        if outcome.verdict != HELD:
            raise _NotHeld(outcome)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if not isinstance(excinfo.value, _NotHeld):
            return super().repr_failure(excinfo, style)
        from rescnn_verify import report

        outcome = excinfo.value.outcome
        witness = report.witness_of(outcome, self.config.getoption("--target"))
        if witness is None:
            return f"{outcome.verdict}: {outcome.name}\n{outcome.reason or outcome.got}"
        return (
            f"falsified: {self.prop.title}\n\n{outcome.what}\n  expected  {outcome.expected}\n"
            f"  got       {outcome.got}\n  case      {witness.case}\n\n{witness.python()}"
        )

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.prop.name


class _NotHeld(AssertionError):
    def __init__(self, outcome: Any) -> None:
        super().__init__(outcome.name)
        self.outcome = outcome


_TARGET = pytest.StashKey["Target"]()
_MISTAKE = pytest.StashKey[str]()


def _target(config: pytest.Config) -> Target:
    from rescnn_verify.target import load

    if _TARGET not in config.stash:
        config.stash[_TARGET] = load(config.getoption("--target"))
    return config.stash[_TARGET]
