"""Two runs side by side: `python -m benchmarks --compare A.json B.json`.

Times of two runs are of two moments, so what is compared is the ratio of each candidate
to the first of its case, and how much that ratio has changed. A change within the noise
of the two runs, the ratio of the first to itself, is none.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.measure import is_control, original
from benchmarks.targets import geometric_mean

Row = dict[str, Any]
Key = tuple[str, str, str, str]
# What a change must be beside the noise, and at least.
_LEAST = 1.03
_EXACT = {"temporary_bytes": "memory", "compile_seconds": "compile time"}
_COMPILE = 1.5  # Compilation has no control; less than this may be chance.


def compare(before: Path, after: Path) -> list[str]:
    """Lines of Markdown: what has changed, and the mean of each suite."""
    first, second = _read(before), _read(after)
    shared = [key for key in first if key in second]
    if not shared:
        raise SystemExit(f"--compare: {before} and {after} have no case in common.")
    lines = [f"# {before} -> {after}", "", f"{len(shared)} candidates are in both.", ""]
    table = [("suite", "case", "of", "candidate", "what", "before", "after", "change")]
    for key in shared:
        noise = max(_noise(key, first), _noise(key, second), _LEAST)
        table += _changes(key, first[key], second[key], noise)
    lines += _markdown(table) if len(table) > 1 else ["Nothing has changed."]
    return [*lines, "", *_means(shared, first, second)]


def _read(path: Path) -> dict[Key, Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        # One measurement may be off by any factor: it has no quartiles.
        is_sure = lambda row: "missing" not in row and row.get("quartiles") != []
        rows = [row for row in rows if is_sure(row)]
        names = ("suite", "case", "of", "candidate")
        # On a mesh a case is measured on several numbers of devices.
        case = lambda r: {**r, "case": f"{r['case']} {r.get('devices', '')}".strip()}
        return {tuple(case(row)[n] for n in names): row for row in rows}  # pyright: ignore
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(
            f"--compare: {path} must be the results.json of a run "
            f"({type(error).__name__}: {error})."
        ) from None


def _noise(key: Key, rows: dict[Key, Row]) -> float:
    """How far the control of a case is from the first, up or down."""
    for other, row in rows.items():
        if other[:3] == key[:3] and is_control(row) and row.get("ratio"):
            first = rows.get((*key[:3], original(other[3])), {})
            ratio = row["ratio"] / first.get("ratio", 1.0)
            return max(ratio, 1 / ratio)
    return 1.0


def _changes(key: Key, before: Row, after: Row, noise: float) -> list[tuple]:
    limits = {"ratio": ("time, as a ratio to the first", noise)}
    limits |= {
        name: (text, _COMPILE if name == "compile_seconds" else _LEAST)
        for name, text in _EXACT.items()
    }
    found = []
    for name, (text, limit) in limits.items():
        old, new = before.get(name), after.get(name)
        if not old or not new or is_control(before):
            continue
        change = new / old
        if max(change, 1 / change) > limit:
            found.append((*key, text, f"{old:.3g}", f"{new:.3g}", f"{change:.2f}"))
    return found


def _means(shared: list[Key], first: dict[Key, Row], second: dict[Key, Row]) -> list:
    """Of each suite and candidate, the geometric mean of the changes in time."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for key in shared:
        old, new = first[key].get("ratio"), second[key].get("ratio")
        if old and new:
            ratios.setdefault((key[0], key[3]), []).append(new / old)
    table = [("suite", "candidate", "cases", "mean change")]
    for (suite, name), values in ratios.items():
        table.append((suite, name, str(len(values)), f"{geometric_mean(values):.2f}"))
    return _markdown(table)


def _markdown(table: list[tuple]) -> list[str]:
    header, *rows = table
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(header), line(["---"] * len(header)), *map(line, rows)]
