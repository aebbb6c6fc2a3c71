"""What an optimised program sends from device to device."""

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
BYTES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}
BYTES |= {"pred": 1, "s8": 1, "u8": 1}


class Collective(NamedTuple):
    operation: str
    bytes: int
    in_a_loop: bool


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program, from its text (`compiled.as_text()`)."""
    computations = _computations(text)
    bodies = set(re.findall(r"(?:body|condition)=%?([\w.-]+)", text))
    in_loops = _called_from(bodies, computations)
    start = rf"= (\(?.*?\)?) ({'|'.join(OPERATIONS)})(?:-start)?\("
    return [
        Collective(match[2], _size(match[1]), name in in_loops)
        for name, lines in computations.items()
        for line in lines
        if (match := re.search(start, line))
    ]


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of the module."""
    lines_of: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            name = match[1]
        lines_of.setdefault(name, []).append(line)
    return lines_of


def _called_from(names: set[str], computations: dict[str, list[str]]) -> set[str]:
    """These computations, and all that they call."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name in found or name not in computations:
            continue
        found.add(name)
        called = re.findall(
            r"(?:calls|to_apply|body|condition)=%?([\w.-]+)",
            "\n".join(computations[name]),
        )
        waiting.extend(called)
    return found


def _size(types: str) -> int:
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
    sizes = [
        np.prod([int(n) for n in shape.split(",") if n] or [1]) for _, shape in arrays
    ]
    return int(sum(BYTES[dtype] * n for (dtype, _), n in zip(arrays, sizes)))
