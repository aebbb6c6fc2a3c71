"""Timing in rounds: every measurement has one of the default right beside it.

A machine that is busy, hot or throttled is slower for a while, and then for all
programs. So times of different moments say little, and their ratios do. In each round
every contender is measured once, in random order, and after every two of them the
*yardstick*: the default, if it is not far behind. A contender's ratio is its time
divided by the mean of the yardstick's times before and after. The yardstick's ratios to
itself, one after the other, are the noise.
"""

import dataclasses
import math
import random
import statistics
from typing import Any

from tdjax._tuning.candidates import Candidate, at_most
from tdjax._tuning.clock import device_of, timed
from tdjax._tuning.device_time import busy_seconds, mark, profiled
from tdjax._tuning.processes import agreed, in_all

# A contender that is this many times slower than the fastest is dropped: after its
# first run, which others disturb; after runs of its own, and after each of the first
# rounds if it was in all of them, both times what the noise is.
_FAR_BEHIND, _BEHIND = 4.0, 1.3
# A first run that is shorter than this, in seconds, may be long by chance alone.
MAY_BE_CHANCE = 1.0
_BEHIND_IN_ROUNDS = (1.3, 1.2, 1.12, 1.08)
_A_LITTLE_BEHIND = 1.05
_MOST_ROUNDS = 21
# Rounds before a contender may be dropped for a little, and before all are as good.
_ENOUGH_ROUNDS = 5
_AS_GOOD = 1.02
# With less noise than this, a race need not last longer than all before it; with more,
# it has at least so many rounds.
_STEADY, _ROUNDS_IN_NOISE = 1.1, 11
_SHORTEST_MEASUREMENT = 5e-3  # seconds
# A run that is shorter than this, in seconds, is repeated before the rounds, if it
# takes less than this part of the time left.
_SHORT_RUN, _SHORT_PART = 0.1, 0.003
# So many of the fastest are to have enough rounds, if these take at most this part of
# the time that is left for the race: a few that are compared well are better than many
# that were measured once.
_FINALISTS, _FOR_ROUNDS = 4, 0.5
# In the runs before the rounds the default comes after so many others. What is behind
# by less than this has another run; a short one costs little, and is easily disturbed.
_OTHERS_BETWEEN, _SECOND_CHANCE, _SECOND_CHANCE_IF_SHORT = 4, 1.15, 2.0


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

    def best_ratio(self, yardstick: "Contender") -> float:
        """Its best time as a multiple of the yardstick's best."""
        return min(self.seconds) / min(yardstick.seconds)


def round_seconds(contenders: list[Contender], yardstick: Contender) -> float:
    """How long a round of them takes."""
    one = lambda c: _calls(c.alone) * c.alone
    between = len(contenders) // 2
    return sum(map(one, contenders)) + between * one(yardstick)


def race_seconds(contenders: list[Contender]) -> float:
    """How long a race may take, by first runs: a run of each, and rounds of a few."""
    fastest = sorted(contenders, key=lambda c: c.alone)[:_FINALISTS]
    rounds = 2 * _ENOUGH_ROUNDS * round_seconds(fastest, fastest[0]) if fastest else 0.0
    return 1.5 * sum(c.alone for c in contenders) + rounds


class Race:
    """The contenders, the yardstick among them, and those that were dropped.

    `left()` are the seconds that are left, and `enough` those after which it stops,
    once there were enough rounds.
    """

    def __init__(self, contenders: list[Contender], args: tuple, left, enough: float):
        self.contenders, self.args, self.left = contenders, args, left
        self.enough = enough
        self.everyone = [*contenders]
        self.yardstick = contenders[0]
        self._random, self._is_cut = random.Random(0), False

    def run(self) -> bool:
        """Whether it is decided; if not, time has run out."""
        start = self.left()
        is_far_behind = lambda c: c.alone > _FAR_BEHIND * self._fastest()
        for contender in filter(is_far_behind, [*self.contenders]):
            if contender.alone < MAY_BE_CHANCE:
                again = [self._time(contender) for _ in range(2)]
                contender.alone = min(contender.alone, *again)
        self._drop(is_far_behind)
        self.contenders.sort(key=lambda c: c.alone)  # Time may run out.
        self._keep_what_can_run_alone()
        if not self._run_each_alone():
            self._run_again()
            return False
        self._keep_what_there_is_time_for()
        for done in range(1, _MOST_ROUNDS + 1):
            if len(self.contenders) == 1:
                return not self._is_cut
            if round_seconds(self.contenders, self.yardstick) > self.left():
                return False
            self._round()
            self._drop_the_slow(done)
            is_steady = self._noise() < _STEADY
            if done < (_ENOUGH_ROUNDS if is_steady else _ROUNDS_IN_NOISE):
                continue
            is_late = is_steady and start - self.left() > self.enough
            if is_late or self._is_decided():
                break
        return not self._is_cut

    def _run_each_alone(self) -> bool:
        """One undisturbed measurement of each, which chooses the yardstick.

        The default comes in between, so that a slow moment is seen as one.
        """
        control = self._control()
        ratios = dict[Contender, float]()
        noise = self._ratios_to(control, self.contenders, ratios)
        if len(ratios) < len(self.contenders):
            return False
        behind = _BEHIND * noise * min(ratios.values())

        def is_close(c: Contender) -> bool:
            is_short = c.alone < _SHORT_RUN
            chance = _SECOND_CHANCE_IF_SHORT if is_short else _SECOND_CHANCE
            return behind < ratios[c] < chance * noise * behind

        self._ratios_to(control, [*filter(is_close, self.contenders)], ratios)
        self._drop(lambda c: ratios[c] > behind)
        self.contenders.sort(key=ratios.__getitem__)
        fastest = min(self.contenders, key=ratios.__getitem__)
        self.yardstick = control if control in self.contenders else fastest
        return True

    def _keep_what_can_run_alone(self) -> None:
        """Drops the slowest, as far as is known, to leave time for the rounds."""
        control = self._control()
        others = [c for c in self.contenders if c is not control]
        finalists = [*others[:_FINALISTS], control]
        rounds = _ENOUGH_ROUNDS * round_seconds(finalists, control)
        left = self.left()
        for_runs = left - min(rounds, _FOR_ROUNDS * left)

        def runs() -> float:
            # Of the control: its own, one before, one for second chances, and between.
            between = len(others) / _OTHERS_BETWEEN
            return sum(c.alone for c in others) + (3 + between) * control.alone

        while len(others) > 1 and runs() > for_runs:
            self._cut(others.pop())

    def _control(self) -> Contender:
        """What comes in between when all are run alone: the default, if it is there."""
        defaults = (c for c in self.contenders if c.candidate.is_default)
        return next(defaults, self.contenders[0])

    def _cut(self, slowest: Contender) -> None:
        """Leaves one out for lack of time: the next call goes on with it."""
        self.contenders = [c for c in self.contenders if c is not slowest]
        self._is_cut = True

    def _keep_what_there_is_time_for(self) -> None:
        """Drops the slowest, until there is time for enough rounds of the others."""
        others = [c for c in self.contenders if c is not self.yardstick]
        rounds = lambda: _ENOUGH_ROUNDS * round_seconds(self.contenders, self.yardstick)
        while len(others) > 1 and rounds() > self.left():
            self._cut(others.pop())

    def _run_again(self) -> None:
        """Runs the default and the fastest: nothing is compiled beside them now."""
        defaults = [c for c in self.contenders if c.candidate.is_default]
        fastest = min(self.contenders, key=lambda c: c.alone)
        # In the same order in every process.
        for contender in dict.fromkeys([*defaults, fastest]):
            contender.alone = self._time(contender)

    def _ratios_to(
        self, control: Contender, contenders: list[Contender], ratios: dict
    ) -> float:
        """Notes the least ratios; returns by what factor the control changed."""
        controls = [self._time_alone(control)]
        for i, contender in enumerate(contenders, 1):
            if 2 * contender.alone > self.left():
                break
            contender.alone = self._time_alone(contender)
            ratio = contender.alone / controls[-1]
            ratios[contender] = min(ratio, ratios.get(contender, math.inf))
            if i % _OTHERS_BETWEEN == 0:
                controls.append(self._time_alone(control))
        return max(map(_change, controls, controls[1:]), default=1.0)

    def _time_alone(self, contender: Contender) -> float:
        """The least of three if they are short: a single run may be disturbed."""
        first = contender.alone = self._time(contender)
        if first >= min(_SHORT_RUN, _SHORT_PART * self.left()):
            return first
        return min(first, *(self._time(contender) for _ in range(2)))

    def _fastest(self) -> float:
        return min(c.alone for c in self.contenders)

    def _round(self) -> None:
        others = [c for c in self.contenders if c is not self.yardstick]
        self._random.shuffle(others)
        pairs = [others[i : i + 2] for i in range(0, len(others), 2)]
        order = [self.yardstick]
        for pair in pairs:
            order += [*pair, self.yardstick]
        times = iter(self._time_in_turn(order))
        before = next(times)
        for pair in pairs:
            measured = [next(times) for _ in pair]
            after = next(times)
            for contender, seconds in zip(pair, measured):
                contender.seconds.append(seconds)
                contender.ratios.append(2 * seconds / (before + after))
            self.yardstick.seconds.append(after)
            self.yardstick.ratios.append(after / before)
            before = after

    def _time_in_turn(self, order: list[Contender]) -> list[float]:
        """Seconds per call of each; of an accelerator, the time that it was busy."""
        seconds = []
        with profiled(device_of(self.args).platform) as profile:
            for i, contender in enumerate(order):
                with mark(i):
                    seconds.append(self._time(contender))
        busy = busy_seconds(profile[0], len(order)) if profile else [0.0] * len(order)
        per_call = [total / _calls(c.alone) for total, c in zip(busy, order)]
        # All by the same clock: where one has no device time, none is used.
        are_known = all(0 < d <= 1.05 * h for d, h in zip(per_call, seconds))
        return [*map(agreed, per_call)] if in_all(are_known) else seconds

    def _time(self, contender: Contender) -> float:
        """Seconds per call, as process 0 measures them."""
        calls = _calls(contender.alone)
        return agreed(timed(contender.program, self.args, calls)[0])

    def _drop(self, is_slow) -> None:
        # A short default stays, to be compared with: beside other programs it may seem
        # much slower than it is (`candidates.choose`).
        stays = lambda c: c.candidate.is_default and c.alone < _SHORT_RUN
        dropped = [c for c in self.contenders if is_slow(c) and not stays(c)]
        for contender in dropped:
            contender.candidate.verdict = "behind"
        self.contenders = [c for c in self.contenders if c not in dropped]

    def _drop_the_slow(self, rounds: int) -> None:
        best = self._typical(self._leader())
        if rounds <= len(_BEHIND_IN_ROUNDS):
            behind = _BEHIND_IN_ROUNDS[rounds - 1] * self._noise()
            # One short measurement is easily disturbed.
            is_sure = lambda c: rounds > 1 or c.alone >= _SHORT_RUN
            is_slow = lambda c: is_sure(c) and min(c.ratios) > behind * best
            self._drop_others(is_slow)
        if rounds >= _ENOUGH_ROUNDS:
            self._drop_others(
                lambda c: _quartiles(c.ratios)[0] > _A_LITTLE_BEHIND * best
            )

    def _noise(self) -> float:
        """By which factor the yardstick changes from one measurement to the next."""
        return statistics.median(_change(1.0, r) for r in self.yardstick.ratios)

    def _drop_others(self, is_slow) -> None:
        self._drop(lambda c: c is not self.yardstick and is_slow(c))

    def _leader(self) -> Contender:
        return min(self.contenders, key=self._typical)

    def _typical(self, contender: Contender) -> float:
        return 1.0 if contender is self.yardstick else contender.typical

    def _is_decided(self) -> bool:
        """Whether no more rounds could change the choice by much."""
        leader = self._leader()
        best = self._typical(leader)
        others = [c for c in self.contenders if c not in (leader, self.yardstick)]
        if any(self._typical(c) > _AS_GOOD * best for c in others):
            return False
        ratios = leader.ratios
        return best > 1 / _AS_GOOD or (
            at_most(best, _quartiles(ratios), len(ratios)) < 1
        )

    def summarise(self) -> None:
        """Notes times and ratios of everyone in the candidates."""
        base = self._base()
        for contender in self.everyone:
            candidate, seconds = contender.candidate, contender.seconds
            candidate.run_seconds = statistics.median(seconds or [contender.alone])
            candidate.spread = _quartiles(seconds)
            candidate.rounds = len(contender.ratios)
            ratio, spread = contender.alone / self.yardstick.alone, None
            if contender is self.yardstick:
                ratio = 1.0
            elif contender.ratios:
                ratio = contender.typical
                best_ratio = contender.best_ratio(self.yardstick)
                candidate.best_ratio = best_ratio / base
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


def _change(before: float, after: float) -> float:
    """By which factor it changed, up or down."""
    return max(before / after, after / before)


def _calls(seconds: float) -> int:
    """How many calls make a measurement that is long enough."""
    return max(1, math.ceil(_SHORTEST_MEASUREMENT / max(seconds, 1e-6)))
