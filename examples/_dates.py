"""Dates as people write them, beside their ISO 8601 forms: a small grammar.

Years, months, days, and intervals of two days in one year, for which ISO 8601 writes
the year once: `"from 3 March to 5 April 1987"` is `"1987-03-03/04-05"`.
"""

import calendar
import datetime
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

FIRST_YEAR, LAST_YEAR = 1900, 2099
HELD_OUT_OF = 20
LONGEST_PHRASE = 72
LONGEST_DATE = len("1987-03-03/04-05")
SHARES = {"year": 0.05, "month": 0.1, "day": 0.35, "interval": 0.5}

# A name in braces is a rule to go on with, or words of the date.
RULES = {
    "a year": ("{year}", "in {year}", "the year {year}"),
    "a month": ("{month} {year}", "in {month}, {year}", "{month} of the year {year}"),
    "a day": (
        "{nth} {month} {year}",
        "{month} {nth}, {year}",
        "the {ordinal} of {month}, {year}",
        "{weekday}, {nth} {month} {year}",
        "{weekday}, {month} {nth}, {year}",
        "{weekday} the {ordinal} of {month} {year}",
    ),
    "an interval": (
        "{first} to {last} {year}",
        "from {first} to {last}, {year}",
        "between {first} and {last}, {year}",
        "in {year}, from {first} to {last}",
    ),
    "a day of the year": ("{nth} {month}", "{month} {nth}", "the {ordinal} of {month}"),
    "nth": ("{day}", "{day}", "{ordinal}"),
    "ordinal": ("{day}{suffix}", "{day in words}"),
    "month": ("{month name}", "{month name}", "{short month}"),
    "weekday": ("{weekday name}", "{short weekday}"),
    "year": ("{digits}", "{year in words}"),
}
_SLOT = re.compile(r"{(.*?)}")

ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ONES += ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen")
ONES += ("seventeen", "eighteen", "nineteen")
TENS = ("", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty")
TENS += ("ninety",)
IRREGULAR = {"one": "first", "two": "second", "three": "third", "five": "fifth"}
IRREGULAR |= {"eight": "eighth", "nine": "ninth", "twelve": "twelfth"}


class Date(NamedTuple):
    """A day, or with a 0 for the day a month, or with two a year."""

    year: int
    month: int = 0
    day: int = 0

    def iso(self) -> str:
        parts = f"{self.year}", f"{self.month:02}", f"{self.day:02}"
        return "-".join(parts[: 1 + (self.month > 0) + (self.day > 0)])


def split_dates() -> tuple[dict[str, list[Date]], dict[str, list[Date]]]:
    """Training and held-out dates, by kind; no date is on both sides."""
    sides = {}, {}
    for kind, dates in _all_dates().items():
        order = np.random.default_rng(len(dates)).permutation(len(dates))
        cut = len(dates) // HELD_OUT_OF
        sides[0][kind] = [dates[i] for i in order[cut:]]
        sides[1][kind] = [dates[i] for i in order[:cut]]
    return sides


def _all_dates() -> dict[str, list[Date]]:
    years = range(FIRST_YEAR, LAST_YEAR + 1)
    first = datetime.date(FIRST_YEAR, 1, 1).toordinal()
    last = datetime.date(LAST_YEAR, 12, 31).toordinal()
    days = map(datetime.date.fromordinal, range(first, last + 1))
    return {
        "day": [Date(d.year, d.month, d.day) for d in days],
        "month": [Date(year, month) for year in years for month in range(1, 13)],
        "year": [Date(year) for year in years],
    }


def draw_pairs(
    dates: dict[str, list[Date]], count: int, seed: int
) -> list[tuple[str, str]]:
    """Random dates in random phrasings: `[("March 3rd, 1987", "1987-03-03"), ...]`."""
    pairs = _pairs(dates, np.random.default_rng(seed))
    short = (pair for pair in pairs if len(pair[0]) <= LONGEST_PHRASE)
    return list(itertools.islice(short, count))


def _pairs(
    dates: dict[str, list[Date]], rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    days = {year: [] for year in range(FIRST_YEAR, LAST_YEAR + 1)}
    for day in dates["day"]:
        days[day.year].append(day)
    while True:
        kind = rng.choice(list(SHARES), p=list(SHARES.values()))
        if kind == "interval":
            yield _interval(*_interval_ends(days, rng), rng)
        else:
            date = _draw(dates[kind], rng)
            yield _expand(f"{{a {kind}}}", _words(date, rng), rng), date.iso()


def _draw(alternatives: Sequence[Any], rng: np.random.Generator) -> Any:
    return alternatives[int(rng.integers(len(alternatives)))]


def _interval_ends(
    days: dict[int, list[Date]], rng: np.random.Generator
) -> tuple[Date, Date]:
    year = _draw(list(days), rng)
    rows = rng.choice(len(days[year]), 2, replace=False)
    first, last = sorted(days[year][row] for row in rows)
    return first, last


def _interval(first: Date, last: Date, rng: np.random.Generator) -> tuple[str, str]:
    ends = {
        name: _expand("{a day of the year}", _words(date, rng), rng)
        for name, date in (("first", first), ("last", last))
    }
    phrase = _expand("{an interval}", {**_words(first, rng), **ends}, rng)
    return phrase, f"{first.iso()}/{last.iso().partition('-')[2]}"


def _expand(text: str, words: dict[str, str], rng: np.random.Generator) -> str:
    """Follows the rules until no name in braces is left."""

    def fill(slot: re.Match[str]) -> str:
        name = slot[1]
        return words.get(name) or _expand(_draw(RULES[name], rng), words, rng)

    return _SLOT.sub(fill, text)


def _words(date: Date, rng: np.random.Generator) -> dict[str, str]:
    """What the grammar has no rule for."""
    spoken = _draw(years_in_words(date.year), rng)
    words = {"digits": str(date.year), "year in words": spoken}
    if date.month:
        month = calendar.month_name[date.month]
        words |= {"month name": month, "short month": month[:3]}
    if date.day:
        weekday = calendar.day_name[datetime.date(*date).weekday()]
        words |= {"weekday name": weekday, "short weekday": weekday[:3]}
        ordinal = ordinal_in_words(date.day)
        suffix = ordinal[-2:]
        words |= {"day": str(date.day), "suffix": suffix, "day in words": ordinal}
    return words


def number_in_words(number: int) -> str:
    """Of numbers below 100: `"eighty-seven"`."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def ordinal_in_words(number: int) -> str:
    """`"eighty-seventh"`, `"twentieth"`."""
    head, hyphen, last = number_in_words(number).rpartition("-")
    last = IRREGULAR.get(last) or re.sub("y$", "ie", last) + "th"
    return head + hyphen + last


def years_in_words(year: int) -> list[str]:
    """The ways to say a year: `["two thousand and five", "twenty oh five"]`."""
    century, rest = divmod(year, 100)
    century_name = number_in_words(century)
    long = "two thousand" if century == 20 else f"{century_name} hundred"
    if rest == 0:
        return [long]
    small = number_in_words(rest)
    return [f"{long} and {small}", f"{century_name} {'oh ' * (rest < 10)}{small}"]
