"""The engine: runs one property over cases and says what came of it."""

from __future__ import annotations

import functools
import hashlib
import math
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rescnn_verify.case import Case, Config
from rescnn_verify.compare import Falsified
from rescnn_verify.coverage import pairs_of
from rescnn_verify.drawing import NoCase, RandomDraw, draw_extreme, draw_trial
from rescnn_verify.enumeration import batched, every_case, every_input
from rescnn_verify.journal import Journal
from rescnn_verify.outcome import (
    BAD_TARGET,
    FALSIFIED,
    HELD,
    INTERNAL_ERROR,
    KNOWN,
    NOT_APPLICABLE,
    NOT_RUN,
    NOTHING_ASSERTED,
    Outcome,
    signature,
)
from rescnn_verify.shrinking import shrink
from rescnn_verify.space import ARCHITECTURES, EXTREMES, USUAL, Choice, Integers, Space, SpaceError
from rescnn_verify.statement import Property
from rescnn_verify.subject import environment
from rescnn_verify.target import Target, TargetError
from rescnn_verify.trial import Tally, run_trial

__all__ = ["PROFILES", "Profile", "Search", "check_property", "search_property"]

Trial = tuple[Case, ...]

#: In a space that somebody named, every so many sampled trials have cases that may cost so many
#: times as much as the property otherwise allows: so large inputs are seen, if less often.
DEAR_EVERY, DEAR = 16, 64

#: Every so many sampled trials, and extreme cases, have the documented kernels, as far as a space
#: has them: what most people have, and have fast paths for.
DOCUMENTED_EVERY, DOCUMENTED_KERNELS = 6, (3, 5, 7)


@dataclass(frozen=True)
class Profile:
    """How long to search.

    Args:
        sampled: trials sampled uniformly for each property; a trial has up to `Property.inputs`
            cases.
        drawn: trials drawn by Hypothesis.
        shrinking: seconds spent on making a counterexample smaller.
        extreme: cases that are very large in one respect.
        slow: whether slow properties run, and exhaustive ones over every case of their space.
    """

    sampled: int
    drawn: int
    shrinking: float
    extreme: int = 0
    slow: bool = False


PROFILES = {
    "quick": Profile(sampled=8, drawn=2, shrinking=1.0),
    "default": Profile(sampled=46, drawn=1, shrinking=2.0, extreme=1),
    "thorough": Profile(sampled=1000, drawn=150, shrinking=20.0, extreme=16, slow=True),
}


@dataclass(frozen=True)
class Search:
    """Where the cases of one run of a property come from, in this order, and when to stop.

    Args:
        trials: given ones; more of them come last, in ``last``.
        configs: configurations that are run with every input of the space.
        documented: whether the documented configuration is run where the property asks for it.
        exhaustive: whether an exhaustive property runs over all of its space, and nothing else.
        sampled: trials sampled uniformly.
        extreme: cases in `space.EXTREMES`, one after the other, as far as the space has them.
        drawn: trials drawn by Hypothesis.
        seconds: no further trial is begun after so many.
        shrinking: seconds spent on making a counterexample smaller.
        slow: whether a slow property runs at all.
        shard: (i, n): the seeds of sampled and drawn cases are i modulo n where the space has
            such seeds, so that n searches never try the same one of these cases.
        known: signatures of failures that are counted, and not searched any further.
        seen: pairs of classes of factors met before; a case that meets another is remarkable.
            None: nothing is.
        last: given trials that are run after all others.
    """

    trials: tuple[Trial, ...] = ()
    configs: tuple[Config, ...] = ()
    documented: bool = False
    exhaustive: bool = False
    sampled: int = 0
    extreme: int = 0
    drawn: int = 0
    seconds: float = math.inf
    shrinking: float = 0.0
    slow: bool = True
    shard: tuple[int, int] = (0, 1)
    known: tuple[str, ...] = ()
    seen: int | None = None
    last: tuple[Trial, ...] = ()

    @classmethod
    def of(cls, profile: Profile, prop: Property) -> Search:
        """The search of a profile for one property."""
        return cls(
            documented=True,
            exhaustive=profile.slow,
            sampled=round(profile.sampled * prop.effort),
            extreme=profile.extreme * prop.extreme,
            drawn=max(1, round(profile.drawn * prop.effort)),
            shrinking=profile.shrinking,
            slow=profile.slow,
        )


def check_property(
    prop: Property,
    target: Target,
    *,
    profile: Profile,
    seed: int,
    device: str = "cpu",
) -> Outcome:
    """Searches for a counterexample to a property as a profile says; deterministic given the seed.

    An exception of the target's falsifies; one of the suite's own machinery is an internal error.
    """
    return search_property(prop, target, Search.of(profile, prop), seed=seed, device=device)


def search_property(
    prop: Property,
    target: Target,
    search: Search,
    *,
    seed: int,
    device: str = "cpu",
    journal: Journal | None = None,
) -> Outcome:
    """Runs one search for a counterexample to a property; deterministic given the seed.

    An exception of the target's falsifies; one of the suite's own machinery is an internal error.

    Args:
        prop, target: what is checked of what.
        search: where cases come from, and when to stop.
        seed: sampled and drawn cases are a function of it.
        device: ``"cpu"`` or ``"cuda"``.
        journal: where each case is written before it runs, if anywhere.
    """
    start = time.perf_counter()

    def without_cases(verdict: str, reason: str) -> Outcome:
        return Outcome(prop.name, verdict, prop.evidence, device, reason=reason)

    if missing := prop.missing(target):
        return without_cases(NOT_APPLICABLE, missing)
    if device == "cuda" and not torch.cuda.is_available():
        return without_cases(NOT_RUN, "no device")
    if prop.slow and not search.slow:
        return without_cases(
            NOT_RUN, "slow: left to the thorough profile and to campaigns of ten minutes or more"
        )
    try:
        space = prop.space_for(target, device)
    except SpaceError:
        return without_cases(NOT_APPLICABLE, f"it is not claimed on {device}")
    run = _Run(prop, target, space, search, _seed_for(prop, seed), journal)
    found: dict[str, Any] = {}
    try:
        with environment():
            verdict, reason = run.verdict()
        if run.failure:
            error = run.failure.error
            found = {"what": error.what, "expected": error.expected, "got": error.got}
            found["trial"] = run.failure.trial
    except TargetError as mistake:
        verdict, reason = BAD_TARGET, str(mistake)
    except Exception:
        verdict, reason = INTERNAL_ERROR, traceback.format_exc()
    tally = run.tally
    exhausted = verdict == HELD and prop.exhaustive and search.exhaustive
    return Outcome(
        name=prop.name,
        verdict=verdict,
        evidence=f"exhausted over {tally.cases} cases" if exhausted else prop.evidence,
        device=device,
        cases=tally.cases,
        assertions=tally.assertions,
        architectures=len(tally.architectures),
        seconds=time.perf_counter() - start,
        reason=reason,
        worst_ratio=tally.worst_ratio,
        sampled=run.sampled,
        discarded=tally.discarded,
        known=run.known,
        signatures=tuple(sorted(run.signatures)),
        pairs=tally.pairs,
        configs=frozenset(_fingerprint(config) for config in tally.architectures),
        remarkable=run.remarkable,
        **found,
    )


@dataclass
class _Failure:
    trial: Trial
    error: Falsified


class _Done(Exception):
    """The search's seconds are over, or there is nothing left to try."""


@dataclass
class _Run:
    """One search, and what came of it so far."""

    prop: Property
    target: Target
    space: Space
    search: Search
    seed: int
    journal: Journal | None
    tally: Tally = field(default_factory=Tally)
    failure: _Failure | None = None
    sampled: int = 0
    known: int = 0
    signatures: set[str] = field(default_factory=set)
    timed_out: bool = False
    tightest: tuple[float, Trial] | None = None
    corners: list[Trial] = field(default_factory=list)

    def verdict(self) -> tuple[str, str | None]:
        """Searches, makes what it found smaller, and says what came of it and why."""
        give_up = time.perf_counter() + self.search.seconds

        def over() -> bool:
            self.timed_out = time.perf_counter() > give_up
            return self.timed_out

        for source in (
            self._given,
            self._configured,
            self._documented,
            self._exhausted,
            self._sampled,
            self._extreme,
            self._drawn,
            self._given_last,
        ):
            try:
                source(over)
            except _Done:
                break
            except Falsified:
                self._shrink()
                return FALSIFIED, None
        if self.known:
            return KNOWN, f"{self.known} cases failed as a known failure does"
        if self.tally.assertions:
            return HELD, None
        if self.tally.not_applicable:
            return NOT_APPLICABLE, self.tally.not_applicable
        if self.timed_out:
            return NOTHING_ASSERTED, "the time was up before a comparison was made"
        if not self.tally.cases:
            return NOTHING_ASSERTED, "no case of its space could be drawn"
        return NOTHING_ASSERTED, "no comparison was made"

    @property
    def remarkable(self) -> tuple[tuple[str, Trial], ...]:
        """The trial that came closest to a bound, and those that met a rare corner."""
        corners = tuple(("corner", trial) for trial in self.corners)
        return corners if self.tightest is None else (("tight", self.tightest[1]), *corners)

    def _given(self, over: Callable[[], bool]) -> None:
        for trial in self.search.trials:
            self._examine(trial, over)

    def _given_last(self, over: Callable[[], bool]) -> None:
        for trial in self.search.last:
            self._examine(trial, over)

    def _configured(self, over: Callable[[], bool]) -> None:
        for config in self.search.configs:
            for trial in batched(every_input(self.space, config), 64):
                self._examine(trial, over)

    def _documented(self, over: Callable[[], bool]) -> None:
        if not (self.search.documented and self.prop.documented):
            return
        if self.target.promises_everything and not self._exhausts:
            self._examine((documented_case(self.target, self.space),), over)

    def _exhausted(self, over: Callable[[], bool]) -> None:
        if not self._exhausts:
            return
        for case in every_case(self.space):
            self._examine((case,), over)
        raise _Done

    def _sampled(self, over: Callable[[], bool]) -> None:
        draw = RandomDraw(self.seed)
        for number in range(1, self.search.sampled + 1):
            dear = not self.target.promises_everything and number % DEAR_EVERY == 0
            work = self.prop.work * (DEAR if dear else 1)
            try:
                trial = self._draw(draw, self._turn(self.usual, number), work)
            except NoCase:
                self.tally.discarded += 1
                if over():
                    raise _Done from None
                continue
            before = self.tally.assertions
            self._examine(self._in_shard(trial), over)
            self.sampled += self.tally.assertions > before

    def _extreme(self, over: Callable[[], bool]) -> None:
        draw = RandomDraw(_digest(f"{self.seed}/extreme"))
        mode = self.space.get("mode")
        modes = mode.values if isinstance(mode, Choice) else ()
        regions = [region for region in EXTREMES.values() if self._reaches(region)]
        first = draw.integer(0, max(0, len(regions) - 1))
        for number in range(first, first + self.search.extreme if regions else first):
            turn, place = divmod(number, len(regions))
            space = self.space
            if modes:  # in turn, as the cases are few
                space = space.narrow(mode=Choice(modes[(turn + place) % len(modes)]))
            try:
                region = self._turn(regions[place], number)
                case = draw_extreme(
                    draw, space, region if self._reaches(region) else regions[place]
                )
            except NoCase:
                self.tally.discarded += 1
                continue
            self._examine(self._in_shard((case,)), over)

    def _reaches(self, region: Space) -> bool:
        try:
            self.space.within(region)
        except SpaceError:
            return False
        return True

    def _drawn(self, over: Callable[[], bool]) -> None:
        if not self.search.drawn or not self._has_cases():
            return
        # Imported where it is needed: what replays a case does without Hypothesis.
        from hypothesis import HealthCheck, Phase, given, seed, settings, target
        from hypothesis.errors import Flaky, Unsatisfiable

        from rescnn_verify.strategies import trials

        def steered(trial: Trial) -> None:
            """Lets Hypothesis look for cases that come closer to a bound."""
            if over():
                return
            ratio = self._examine(self._in_shard(trial), lambda: False)
            if ratio is not None and math.isfinite(ratio):
                target(ratio)

        run = settings(
            max_examples=self.search.drawn,
            phases=[Phase.generate, Phase.target],
            database=None,
            deadline=None,
            derandomize=False,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        cases = trials(
            self.usual,
            max_size=self.prop.inputs,
            work=self.prop.work,
            any_config=self._any_config,
        )
        try:
            seed(self.seed)(run(given(cases)(steered)))()
        except Flaky:
            if self.failure is None:
                raise
            raise self.failure.error from None
        except Unsatisfiable:
            self.tally.discarded += 1

    def _draw(self, draw: RandomDraw, space: Space, work: int) -> Trial:
        return draw_trial(
            draw, space, max_size=self.prop.inputs, work=work, any_config=self._any_config
        )

    def _turn(self, space: Space, number: int) -> Space:
        """The space, or the documented kernels in it when it is their turn."""
        kernels, width = space.get("kernel_sizes"), space.get("channels")
        if number % DOCUMENTED_EVERY or kernels is None or DOCUMENTED_KERNELS not in kernels:
            return space
        if isinstance(width, Integers) and width.high < len(DOCUMENTED_KERNELS):
            return space
        return space.narrow(kernel_sizes=Choice(DOCUMENTED_KERNELS))

    def _has_cases(self) -> bool:
        """Whether cases can be drawn: Hypothesis takes long to find out that none can."""
        if self.tally.cases:
            return True
        draw = RandomDraw(self.seed)
        for _ in range(3):
            with suppress(NoCase):
                self._draw(draw, self.usual, self.prop.work)
                return True
        return False

    @functools.cached_property
    def usual(self) -> Space:
        """Where most cases are drawn: of each factor the usual part, unless the target names it."""
        if self.prop.exhaustive:
            return self.space
        own = {n for n, factor in self.target.space.factors if factor != ARCHITECTURES.get(n)}
        space = self.space
        for name, factor in USUAL.factors:
            with suppress(SpaceError):  # a statement may be about what is unusual
                space = space.within(Space({name: factor}), besides=own)
        return space

    @property
    def _exhausts(self) -> bool:
        return self.prop.exhaustive and self.search.exhaustive

    @property
    def _any_config(self) -> bool:
        """Whether no configuration is too dear: all of a space that somebody named counts."""
        return not self.target.promises_everything

    def _in_shard(self, trial: Trial) -> Trial:
        index, count = self.search.shard
        seeds = self.space.get("seed")
        if count == 1 or not isinstance(seeds, Integers) or seeds.high - seeds.low < count:
            return trial
        return tuple(replace(c, seed=_with_remainder(c.seed, index, count, seeds)) for c in trial)

    def _examine(self, trial: Trial, over: Callable[[], bool]) -> float | None:
        """Runs a trial and returns its worst ratio; a failure that is not known is kept, raised."""
        if over():
            raise _Done
        tally, before = self.tally, self.tally.cases
        worst, tally.worst_ratio = tally.worst_ratio, None
        try:
            run_trial(self.prop, self.target, trial, tally, self.journal)
        except Falsified as error:
            if signature(error.what, error.got) not in self.search.known:
                self._keep(trial[: tally.cases - before], error)
                raise
            self.known += 1
            self.signatures.add(signature(error.what, error.got))
            rest = trial[tally.cases - before :]
        else:
            rest = ()
        finally:
            ratio = tally.worst_ratio
            tally.worst_ratio = max((r for r in (worst, ratio) if r is not None), default=None)
        if self.search.seen is not None:
            self._remark(trial, ratio, self.search.seen)
        if rest:
            self._examine(rest, over)
        return ratio

    def _remark(self, trial: Trial, ratio: float | None, seen: int) -> None:
        if ratio is not None and (self.tightest is None or ratio > self.tightest[0]):
            self.tightest = ratio, trial
        new = functools.reduce(int.__or__, map(pairs_of, trial)) & ~seen
        for kept in self.corners:
            new &= ~functools.reduce(int.__or__, map(pairs_of, kept))
        if new and len(self.corners) < 2:
            self.corners.append(trial)

    def _keep(self, trial: Trial, error: Falsified) -> None:
        self.failure = _Failure(trial, error)
        self.signatures.add(signature(error.what, error.got))
        if self.journal:
            self.journal.found(trial, error.what, error.expected, error.got)

    def _shrink(self) -> None:
        assert self.failure is not None
        give_up = time.perf_counter() + self.search.shrinking

        def fails(trial: Trial) -> bool:
            if time.perf_counter() > give_up:
                return False
            try:
                run_trial(self.prop, self.target, trial, journal=self.journal)
            except Falsified as error:
                if signature(error.what, error.got) in self.search.known:
                    return False  # what is new must not shrink to what is known
                self._keep(trial, error)
                return True
            except Exception:  # outside the statement's conditions; what is at hand stays
                return False
            return False

        shrink(self.failure.trial, self.space, fails)


def _with_remainder(number: int, remainder: int, count: int, allowed: Integers) -> int:
    """The allowed number next below that has a remainder modulo ``count``, or else next above."""
    number -= (number - remainder) % count
    return number if number >= allowed.low else number + count


def _fingerprint(config: Config) -> int:
    return int.from_bytes(hashlib.sha256(repr(config).encode()).digest()[:6], "little")


def documented_case(target: Target, space: Space) -> Case:
    """The documented configuration: 512 channels, kernels 3, 5 and 7, length 960.

    Where a space has no such input, the nearest length, and the first of other values.
    """
    case = Case(
        channels=512,
        num_blocks=3 if target.kind == "stack" else 1,
        kernel_sizes=DOCUMENTED_KERNELS,
        dropout=0.1,
    )
    for name in ("device", "dtype", "mode"):
        factor = space.get(name)
        if isinstance(factor, Choice) and getattr(case, name) not in factor.values:
            case = replace(case, **{name: factor.values[0]})
    if isinstance(length := space.get("length"), Integers):
        case = replace(case, length=min(max(length.low, 960), length.high))
    return space.completed(case)


def _seed_for(prop: Property, seed: int) -> int:
    return _digest(f"{seed}/{prop.name}")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
