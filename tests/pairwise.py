"""Test cases that contain every pair of values of their factors: a few dozen in place of thousands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from random import Random
from typing import Any

Case = dict[str, Any]
CANDIDATES = 12  # for each case: the one that covers most is taken


def pairwise_cases(factors: Mapping[str, Sequence[Any]], is_valid: Callable[[Case], bool], seed: int = 0) -> list[Case]:
    """Return cases that contain every valid pair of values (greedy; Cohen et al., The AETG system, 1997).

    `is_valid` is asked about partial cases, too.
    """
    random, cases = Random(seed), list[Case]()
    uncovered = {
        (a, x, b, y)
        for a, b in combinations(factors, 2)
        for x in factors[a]
        for y in factors[b]
        if is_valid({a: x, b: y})
    }  # fmt: skip
    while uncovered:
        a, x, b, y = random.choice(sorted(uncovered, key=str))
        candidates = [_extend({a: x, b: y}, factors, uncovered, is_valid, random) for _ in range(CANDIDATES)]
        complete = [case for case in candidates if len(case) == len(factors)]
        if not complete:
            raise ValueError(f"no valid case has {a}={x} and {b}={y}")
        cases.append(max(complete, key=lambda case: len(_pairs(case, factors) & uncovered)))
        uncovered -= _pairs(cases[-1], factors)
    return cases


def _extend(
    case: Case, factors: Mapping[str, Sequence[Any]], uncovered: set[Any], is_valid: Callable[[Case], bool], random: Random
) -> Case:
    """Add to a case the values that cover most pairs, one factor after the other, as far as they are valid."""
    for name in random.sample([name for name in factors if name not in case], len(factors) - len(case)):
        values = [value for value in factors[name] if is_valid({**case, name: value})]
        if not values:
            return case
        random.shuffle(values)
        case = {**case, name: max(values, key=lambda value: len(_pairs({**case, name: value}, factors) & uncovered))}
    return case


def _pairs(case: Case, factors: Mapping[str, Sequence[Any]]) -> set[Any]:
    return {(a, case[a], b, case[b]) for a, b in combinations([name for name in factors if name in case], 2)}
