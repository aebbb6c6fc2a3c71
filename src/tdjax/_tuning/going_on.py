"""An unfinished search, gone on with at the next call."""

import dataclasses
from collections.abc import Iterable

from tdjax._tuning.candidates import NOT_TRIED, Candidate
from tdjax._tuning.search import find_reference


def take_over(candidates: list[Candidate], stored: list[Candidate]) -> None:
    """Puts what is stored in the place of what is not known yet.

    The lowerings of the listed candidates are kept, which hold more than options.
    """
    for i, row in enumerate(stored):
        listed = candidates[i].lowering if i < len(candidates) else None
        base = listed or candidates[0].lowering
        lowering = listed or dataclasses.replace(base, **row.options)
        candidates[i : i + 1] = [dataclasses.replace(row, lowering=lowering)]


def to_go_on_with(candidates: list[Candidate], best: Candidate) -> list[Candidate]:
    """Copies of those to try: the untried, beside the default and the best so far.

    Without untried ones, those that were not decided between.
    """
    reference = find_reference(candidates)
    left = [c for c in candidates if c.is_left]
    known = [c for c in candidates if c.is_default or _key(c) == _key(best)]
    rest = left or [c for c in candidates if c.measured]
    # At least one that is new is tried, however short the budget.
    order = [reference, *rest[:1], *known, *rest[1:]]
    chosen = {_key(c): c for c in order if c is not None}
    fresh = lambda c: dataclasses.replace(c, verdict=NOT_TRIED, ratio_spread=None)
    return list(map(fresh, chosen.values()))


def merge(candidates: list[Candidate], tried: Iterable[Candidate]) -> bool:
    """Takes over what was measured now, and returns whether none is left to try."""
    places = {_key(c): i for i, c in enumerate(candidates)}
    for candidate in tried:
        place = places.get(_key(candidate))
        if place is None:
            candidates.append(candidate)
        elif not candidate.is_left:
            candidates[place] = candidate
    return not any(candidate.is_left for candidate in candidates)


def _key(candidate: Candidate) -> str:
    return f"{candidate.options} {candidate.compiler_options}"
