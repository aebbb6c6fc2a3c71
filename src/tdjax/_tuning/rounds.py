"""Timing in rounds: every measurement has one of the default right beside it.

A machine that is busy, hot or throttled is slower for a while, and then for all
programs. So times of different moments say little, and their ratios do. In each round
every contender is measured once, in random order, and between any two of them the
*yardstick*: the default, if it is not far behind. A contender's ratio is its time
divided by the mean of the yardstick's times right before and after. The yardstick's
ratios to itself, one after the other, are the noise.
"""

import dataclasses
import math
import random
import statistics
from typing import Any

from tdjax._tuning.candidates import Candidate
from tdjax._tuning.clock import timed
from tdjax._tuning.processes import agreed

# A contender that is this many times slower than the fastest is dropped: after its
# first run, which others disturb; after a run of its own; and after rounds.
_FAR_BEHIND, _BEHIND, _A_LITTLE_BEHIND = 4.0, 1.5, 1.05
_MOST_ROUNDS = 13
# Rounds before a contender may be dropped for a little, and before all are as good.
_ENOUGH_ROUNDS = 5
_AS_GOOD = 1.02
_SHORTEST_MEASUREMENT = 5e-3  # seconds
# A run that takes less than this part of the time left is repeated before the rounds.
_SHORT_RUN = 0.003


@dataclasses.dataclass(eq=False)
class Contender:
    """A candidate in the race: its program, and what was measured of it.

    `alone` is the time of its best run before the rounds.
    """

    candidate: Candidate
    program: Any
    alone: float
    seconds: list[float] = dataclasses.field(default_factory=list)
    ratios: list[float] = dataclasses.field(default_factory=list)

    @property
    def typical(self) -> float:
        """Its time as a multiple of the yardstick's."""
        return statistics.median(self.ratios)


class Race:
    """The contenders, the yardstick among them, and those that were dropped."""

    def __init__(self, contenders: list[Contender], args: tuple, left):
        self.contenders, self.args, self.left = contenders, args, left
        self.everyone = [*contenders]
        self.yardstick = contenders[0]
        self._random = random.Random(0)

    def run(self) -> bool:
        """Whether it is decided; if not, time has run out."""
        self._drop(lambda c: c.alone > _FAR_BEHIND * self._fastest())
        if not self._run_each_alone():
            return False
        for done in range(1, _MOST_ROUNDS + 1):
            if len(self.contenders) == 1:
                return True
            if self._round_seconds() > self.left():
                return False
            self._round()
            self._drop_the_slow(done)
            if done >= _ENOUGH_ROUNDS and self._is_decided():
                return True
        return True

    def _run_each_alone(self) -> bool:
        """One undisturbed measurement of each, which chooses the yardstick."""
        for contender in self.contenders:
            if 2 * contender.alone > self.left():
                return False
            # The least of three: a single run may have been disturbed.
            repeats = 3 if contender.alone < _SHORT_RUN * self.left() else 1
            contender.alone = min(self._time(contender) for _ in range(repeats))
        is_slow = lambda c: c.alone > _BEHIND * self._fastest()
        for contender in filter(is_slow, self.contenders):
            contender.alone = min(contender.alone, self._time(contender))
        self._drop(is_slow)
        defaults = [c for c in self.contenders if c.candidate.is_default]
        fastest = min(self.contenders, key=lambda c: c.alone)
        self.yardstick = next(iter(defaults), fastest)
        return True

    def _fastest(self) -> float:
        return min(c.alone for c in self.contenders)

    def _round_seconds(self) -> float:
        one = lambda c: _calls(c.alone) * c.alone
        others = len(self.contenders) - 1
        return sum(map(one, self.contenders)) + others * one(self.yardstick)

    def _round(self) -> None:
        others = [c for c in self.contenders if c is not self.yardstick]
        before = self._time(self.yardstick)
        for contender in self._random.sample(others, len(others)):
            seconds = self._time(contender)
            after = self._time(self.yardstick)
            contender.seconds.append(seconds)
            contender.ratios.append(2 * seconds / (before + after))
            self.yardstick.seconds.append(after)
            self.yardstick.ratios.append(after / before)
            before = after

    def _time(self, contender: Contender) -> float:
        """Seconds per call, as process 0 measures them."""
        calls = _calls(contender.alone)
        return agreed(timed(contender.program, self.args, calls)[0])

    def _drop(self, is_slow) -> None:
        dropped = [c for c in self.contenders if is_slow(c)]
        for contender in dropped:
            contender.candidate.verdict = "behind"
        self.contenders = [c for c in self.contenders if c not in dropped]

    def _drop_the_slow(self, rounds: int) -> None:
        best = self._leader().typical
        if rounds >= 2:
            self._drop_others(lambda c: c.typical > _BEHIND * best)
        if rounds >= _ENOUGH_ROUNDS:
            self._drop_others(
                lambda c: _quartiles(c.ratios)[0] > _A_LITTLE_BEHIND * best
            )

    def _drop_others(self, is_slow) -> None:
        self._drop(lambda c: c is not self.yardstick and is_slow(c))

    def _leader(self) -> Contender:
        ratio = lambda c: 1.0 if c is self.yardstick else c.typical
        return min(self.contenders, key=ratio)

    def _is_decided(self) -> bool:
        """Whether no more rounds could change the choice by much."""
        leader = self._leader()
        best = 1.0 if leader is self.yardstick else leader.typical
        others = [c for c in self.contenders if c not in (leader, self.yardstick)]
        if any(c.typical > _AS_GOOD * best for c in others):
            return False
        return best > 1 / _AS_GOOD or _quartiles(leader.ratios)[1] < 1

    def summarise(self) -> None:
        """Notes times and ratios of everyone in the candidates."""
        base = self._base()
        for contender in self.everyone:
            candidate, seconds = contender.candidate, contender.seconds
            candidate.run_seconds = statistics.median(seconds or [contender.alone])
            candidate.spread = _quartiles(seconds)
            ratio, spread = contender.alone / self.yardstick.alone, None
            if contender is self.yardstick:
                ratio = 1.0
            elif contender.ratios:
                ratio = contender.typical
            if spread := _quartiles(contender.ratios):
                spread = spread[0] / base, spread[1] / base
            candidate.ratio, candidate.ratio_spread = ratio / base, spread

    def _base(self) -> float:
        """The default's ratio to the yardstick."""
        for contender in self.everyone:
            if contender.candidate.is_default and contender is not self.yardstick:
                return contender.alone / self.yardstick.alone
        return 1.0


def _quartiles(values: list[float]) -> Any:
    """The first and the third, or None of less than two values."""
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _calls(seconds: float) -> int:
    """How many calls make a measurement that is long enough."""
    return max(1, math.ceil(_SHORTEST_MEASUREMENT / max(seconds, 1e-6)))
