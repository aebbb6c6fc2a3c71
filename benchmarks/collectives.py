"""What an optimised program sends from device to device, read from its text."""

import re
from typing import NamedTuple

import numpy as np

OPERATIONS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"bf16": 2, "f16": 2, "s16": 2, "u16": 2, "pred": 1, "s8": 1, "u8": 1}


class Collective(NamedTuple):
    """An operation, the bytes of its result, and how often a call runs it.

    `times` is the product of the iterations of the loops around it, 1 outside of loops,
    and 0 if XLA does not know them.
    """

    operation: str
    bytes: int
    times: int


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program, from its text (`compiled.as_text()`)."""
    computations = _computations(text)
    times = _times(computations)
    start = rf"= (\(?.*?\)?) ({'|'.join(OPERATIONS)})(?:-start)?\("
    return [
        Collective(match[2], _size(match[1]), times.get(name, 1))
        for name, lines in computations.items()
        for line in lines
        if (match := re.search(start, line))
    ]


def sent_bytes(text: str) -> int:
    """The bytes of all of them, those in loops as often as they run."""
    return sum(each.bytes * max(each.times, 1) for each in collectives(text))


def has_loops(text: str) -> bool:
    """Whether XLA's own count of operations may miss iterations."""
    return " while(" in text


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of the module."""
    lines_of: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            name = match[1]
        lines_of.setdefault(name, []).append(line)
    return lines_of


def _times(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in a call of the program."""
    called = r"(calls|to_apply|body|condition)=%?([\w.-]+)"
    callers: dict[str, tuple[str, int]] = {}
    for name, lines in computations.items():
        for line in lines:
            count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for kind, callee in re.findall(called, line):
                in_loop = kind in ("body", "condition")
                trips = int(count[1]) if count else 0
                callers[callee] = name, trips if in_loop else 1

    def times(name: str) -> int:
        if name not in callers:
            return 1
        caller, trips = callers[name]
        return trips * times(caller)

    return {name: times(name) for name in computations}


def _size(types: str) -> int:
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
    sizes = [
        np.prod([int(n) for n in shape.split(",") if n] or [1]) for _, shape in arrays
    ]
    return int(sum(BYTES[dtype] * n for (dtype, _), n in zip(arrays, sizes)))
