"""The fault gate: every wrong implementation of the zoo is falsified, every right one is not.

``python -m tests.faults`` prints the kill matrix and exits with 1 if a wrong one survives or a
right one is accused. By default a wrong one is checked until its first falsified property; with
``--full`` every property runs, and the matrix also names the faults that only one property sees.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path

from rescnn_verify.campaign import select
from rescnn_verify.case import Case
from rescnn_verify.drawing import RandomDraw, draw_trial
from rescnn_verify.engine import PROFILES, check_property
from rescnn_verify.fuzz import Campaign, FuzzPlan
from rescnn_verify.outcome import FALSIFIED, NOTHING_ASSERTED, QUIET, Outcome
from rescnn_verify.space import ARCHITECTURES, INPUTS, USUAL
from rescnn_verify.statement import Property, all_properties
from rescnn_verify.target import contract_target
from rescnn_verify.workers import Here, usable_cores, workers
from tests.zoo import RIGHT, WRONG

PROPERTIES = all_properties()
#: Faults that fewer cases of the whole space can show are only reported, not demanded.
DENSITY_LIMIT = 0.01


def run(name: str, seed: int, profile: str, full: bool) -> tuple[str, int, list[Outcome]]:
    """The outcomes of one implementation.

    A wrong one is done with at its first falsified property, unless ``full``. Its likeliest
    families go first, and the quick profile before the other: its samples are the first ones of
    every other profile, so what it finds they find.
    """
    entries = {entry.cls.__name__: entry for entry in (*WRONG, *RIGHT)}
    entry = entries[name]
    target = contract_target(entry.cls, name)
    search = replace(PROFILES[profile], shrinking=0.0)
    if entry in RIGHT or full:
        if entry in RIGHT and profile == "quick":  # a smoke test, as there are many of them
            search = replace(search, sampled=search.sampled // 2, drawn=1)
        return (
            name,
            seed,
            [check_property(p, target, profile=search, seed=seed) for p in PROPERTIES],
        )
    own = [p for p in PROPERTIES if p.family == entry.family]
    arithmetic = [p for p in PROPERTIES if p.family == "arithmetic" != entry.family]
    others = [p for p in PROPERTIES if p not in own + arithmetic]
    outcomes: dict[str, Outcome] = {}
    tried: set[tuple[str, Property]] = set()
    for level, some in (
        ("quick", own + arithmetic),
        (profile, own),
        ("quick", others),
        (profile, arithmetic + others),
    ):
        search = replace(PROFILES[level], shrinking=0.0)
        for prop in some:
            if (level, prop) in tried:
                continue
            tried.add((level, prop))
            outcomes[prop.name] = check_property(prop, target, profile=search, seed=seed)
            if outcomes[prop.name].verdict == FALSIFIED:
                return name, seed, [*outcomes.values()]
    return name, seed, [*outcomes.values()]


def fuzzed(name: str, seed: int, seconds: float) -> tuple[str, int, list[Outcome]]:
    """The outcomes of one implementation in a campaign of so many seconds, on one core."""
    (cls,) = (entry.cls for entry in (*WRONG, *RIGHT) if entry.cls.__name__ == name)
    names = tuple(prop.name for prop in select(None, pairs=False))
    plan = FuzzPlan(f"{cls.__module__}:{name}", names, seconds, seed)
    campaign = Campaign(plan)
    for _ in campaign.run(Here()):
        pass
    return name, seed, campaign.outcomes


def density(trigger) -> float:
    """The share of the sampled space's cases that can show a fault."""
    cases = _sample()
    return sum(bool(trigger(case)) for case in cases) / len(cases)


@functools.cache
def _sample() -> list[Case]:
    draw = RandomDraw(0)
    space = ARCHITECTURES * INPUTS * USUAL
    return [draw_trial(draw, space, max_size=1)[0] for _ in range(4000)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to try each with")
    parser.add_argument("--profile", choices=PROFILES, default="default", help="for wrong ones")
    parser.add_argument("--right-profile", choices=PROFILES, default="default")
    parser.add_argument("--full", action="store_true", help="run every property on every fault")
    parser.add_argument("--fuzz", type=float, metavar="SECONDS", help="by a campaign of so long")
    parser.add_argument("--only", nargs="*", help="names of implementations")
    parser.add_argument("--families", nargs="*", help="wrong implementations of these families")
    parser.add_argument("--right", action="store_true", help="right implementations only")
    parser.add_argument("--wrong", action="store_true", help="wrong implementations only")
    parser.add_argument("--json", type=Path, help="write the kill matrix as JSON")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    families = options.families or {fault.family for fault in WRONG}
    wrong = [fault.cls.__name__ for fault in WRONG if fault.family in families]
    wrong = [] if options.right else wrong
    right = [] if options.wrong else [entry.cls.__name__ for entry in RIGHT]
    names = [name for name in (*right, *wrong) if not options.only or name in options.only]
    if unknown := set(options.only or ()) - {*right, *wrong}:
        parser.error(f"no such implementation: {', '.join(sorted(unknown))}")
    if not names:
        parser.error("nothing is selected")
    results: dict[str, dict[int, list[Outcome]]] = defaultdict(dict)
    with workers(usable_cores()) as executor:
        futures = [
            executor.submit(fuzzed, n, s, options.fuzz)
            if options.fuzz
            else executor.submit(
                run, n, s, options.right_profile if n in right else options.profile, options.full
            )
            for s in range(options.seeds)
            for n in names
        ]
        for future in as_completed(futures):
            name, seed, outcomes = future.result()
            results[name][seed] = outcomes
            taken = sum(outcome.seconds for outcome in outcomes)
            found = [o.name for o in outcomes if o.verdict == FALSIFIED]
            print(f"{taken:6.1f} s  {name}  {', '.join(found)}", flush=True, file=sys.stderr)
    failures = _report_wrong([n for n in wrong if n in results], results, options.seeds)
    failures += _report_right([n for n in right if n in results], results)
    if options.full:
        _report_sole_witnesses(results, wrong)
    if options.json:
        options.json.write_text(json.dumps(_matrix(results), indent=1) + "\n")
    for failure in failures:
        print("FAILED", failure)
    checked = len(names) * options.seeds
    print(f"{time.perf_counter() - start:.0f} s")
    print(f"{checked - len(failures)} passed, {len(failures)} failed")
    return 1 if failures else 0


def _report_wrong(names, results, seeds) -> list[str]:
    faults = {fault.cls.__name__: fault for fault in WRONG}
    failures = []
    print(f"{'wrong implementation':34}{'family':17}{'density':>8}{'found':>7}  by (cases)")
    for name in names:
        fault = faults[name]
        share = density(fault.trigger) if fault.trigger else None
        killers: dict[str, list[int]] = defaultdict(list)
        found = 0
        for seed, outcomes in results[name].items():
            killed = [o for o in outcomes if o.verdict == FALSIFIED]
            found += bool(killed)
            for outcome in killed:
                killers[outcome.name].append(outcome.cases)
            if not killed and (share is None or share >= DENSITY_LIMIT):
                failures.append(f"{name} (seed {seed}) survives: {fault.mistake}")
            failures += _broken(name, seed, outcomes)
        by = ", ".join(f"{k} ({min(v)} to {max(v)})" for k, v in killers.items())
        shown = "" if share is None else f"{share:.2%}"
        print(f"{name:34}{fault.family:17}{shown:>8}{found:>4}/{seeds}  {by}")
    return failures


def _report_right(names, results) -> list[str]:
    hows = {entry.cls.__name__: entry.how for entry in RIGHT}
    failures = []
    print(f"\n{'right implementation':34}{'cases':>8}{'assertions':>12}")
    for name in names:
        for seed, outcomes in results[name].items():
            accused = [o for o in outcomes if o.verdict not in QUIET]
            cases, assertions = sum(o.cases for o in outcomes), sum(o.assertions for o in outcomes)
            print(f"{name:34}{cases:>8}{assertions:>12}  {hows[name]}")
            for o in accused:
                case = o.trial[-1] if o.trial else o.reason
                failures.append(
                    f"{name} (seed {seed}) accused by {o.name}: {o.what}: "
                    f"expected {o.expected}, got {o.got}; {case}"
                )
    return failures


def _broken(name, seed, outcomes) -> list[str]:
    """What went wrong with the suite itself; what asserted nothing because its search was stopped
    at a falsification elsewhere did not."""
    stopped = {NOTHING_ASSERTED} if any(o.verdict == FALSIFIED for o in outcomes) else set()
    return [
        f"{name} (seed {seed}): {o.name}: {o.verdict}: {o.reason}"
        for o in outcomes
        if o.verdict not in {*QUIET, FALSIFIED, *stopped}
    ]


def _report_sole_witnesses(results, wrong) -> None:
    """For each property, the faults that no other property sees."""
    sole = defaultdict(list)
    seen = defaultdict(int)
    for name in wrong:
        killers = {o.name for o in results[name].get(0, ()) if o.verdict == FALSIFIED}
        for killer in killers:
            seen[killer] += 1
        if len(killers) == 1:
            sole[killers.pop()].append(name)
    print(f"\n{'property':62}{'sees':>5}  alone")
    for prop in PROPERTIES:
        print(f"{prop.name:62}{seen[prop.name]:>5}  {', '.join(sole[prop.name])}")


def _matrix(results) -> dict[str, dict[str, dict[str, int]]]:
    """Implementation → seed → falsified property → cases to detection."""
    return {
        name: {
            str(seed): {o.name: o.cases for o in outcomes if o.verdict == FALSIFIED}
            for seed, outcomes in by_seed.items()
        }
        for name, by_seed in results.items()
    }


if __name__ == "__main__":
    sys.exit(main())
