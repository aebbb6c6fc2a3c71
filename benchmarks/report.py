"""What a run leaves: `results.json`, a Markdown table, and plots."""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import is_control
from benchmarks.plots import draw_all
from benchmarks.targets import answers, geometric_mean

Row = dict[str, Any]
BOTH = ("forward", "gradient")


def write(out: Path, results: dict[str, Any]) -> None:
    """All files; each is replaced as a whole or not at all."""
    write_json(out, results)
    _write(out / "README.md", markdown(results))
    draw_all(out, results)


def write_json(out: Path, results: dict[str, Any]) -> None:
    """`results.json` alone, which a run can go on from."""
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "results.json", json.dumps(results, indent=1))


def read(out: Path) -> dict[str, Any]:
    """What `write_json` wrote."""
    path = out / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return {name: results[name] for name in ("about", "ceilings", "rows")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"--resume: {path} can't be read: {error}") from None


def _write(path: Path, text: str) -> None:
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(draft, 0o644)
    os.replace(draft, path)


def markdown(results: dict[str, Any]) -> str:
    about = results["about"]
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    cores = f", {about['cores']} cores" if about["cores"] else ""
    lines = [
        f"# Results on {about['device']}{cores}",
        "",
        f"Python {about['python']}; {versions}.",
        "",
        "A ratio is the median time divided by that of the first row of the case. "
        "Candidates were timed in turn on the same inputs; their results agree. "
        "*Again* is the first candidate once more: its ratio is the noise. *Temporary* "
        "is memory without arguments and results. *Of roofline* may exceed 1 where "
        "data stay in the caches. *Behind* is for what was not in the last rounds: its "
        "time as a multiple of the fastest's of the rounds before.",
        "",
        *promises(results["rows"]),
        "",
        *overview(results["rows"]),
        "",
        *_ceilings(results.get("ceilings", {})),
    ]
    for suite in dict.fromkeys(row["suite"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["suite"] == suite]
        table = _rows(rows, results.get("ceilings", {}))
        folded = ["<details>", f"<summary>{len(rows)} rows</summary>", "", *table]
        lines += ["", f"## {suite}", "", *folded, "", "</details>"]
    return "\n".join(lines) + "\n"


def promises(rows: list[Row]) -> list[str]:
    """The project's targets, each with the figure of this run and its noise."""
    return _table(("measure", "target", "figure", "noise"), answers(rows))


def overview(rows: list[Row]) -> list[str]:
    """Of each candidate, the geometric mean of its ratios over the cases of a suite."""
    columns = [(suite, of) for suite in ("dense", "blocks", "video") for of in BOTH]
    ratios: dict[str, dict[tuple, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        is_asked = (row["suite"], row["of"]) in columns and not is_control(row)
        if is_asked and "ratio" in row:
            ratios[row["candidate"]][row["suite"], row["of"]].append(row["ratio"])
    lengths = lambda key: [len(each[key]) for each in ratios.values()]
    most = {key: max(lengths(key), default=0) for key in columns}

    def cell(each, key) -> str:
        if not each[key]:
            return ""
        # A peer that left out some cases is not comparable by its mean.
        few = "" if len(each[key]) == most[key] else f" ({len(each[key])} cases)"
        return f"{geometric_mean(each[key]):.2f}{few}"

    header = ["", *(f"{suite}, {of}" for suite, of in columns)]
    table = [[name, *(cell(each, k) for k in columns)] for name, each in ratios.items()]
    counts = ["cases", *(str(most[key]) for key in columns)]
    return _table(header, [*table, counts]) if ratios else []


def _ceilings(rates: dict[str, float]) -> list[str]:
    if not rates:
        return []
    shown = ", ".join(
        f"{name} {rate / 1e9:.0f} G{'B' if name == 'copy' else 'flop'}/s"
        for name, rate in rates.items()
    )
    return [f"Ceilings measured in the same run: {shown}."]


def _rows(rows: list[Row], ceilings: dict[str, float]) -> list[str]:
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: row["case"],
        "of": lambda row: row["of"],
        "devices": lambda row: str(row.get("devices", "")),
        "candidate": _name,
        "ratio": lambda row: _number(_same_rounds(row).get("ratio"), "{:.2f}"),
        "quartiles": lambda row: " to ".join(
            f"{q:.2f}" for q in _same_rounds(row).get("quartiles", [])
        ),
        "behind": lambda row: _number(row.get("behind"), "{:.2f}"),
        "first call": lambda row: _number(row.get("first_seconds"), "{:.2f} s"),
        "step": lambda row: _number(_step(row), "{:.2f} ms", 1e-3),
        "compile": lambda row: _number(row.get("compile_seconds"), "{:.2f} s"),
        "temporary": lambda row: _number(row.get("temporary_bytes"), "{:.1f} MB", 1e6),
        "sent": lambda row: _number(row.get("sent_bytes"), "{:.3f} MB", 1e6),
        "flop": lambda row: _number(row.get("device_flops"), "{:.0f} M", 1e6),
        "of roofline": lambda row: _number(roofline(row, ceilings), "{:.2f}"),
        "deviation": lambda row: _number(row.get("deviation"), "{:.0e}"),
    }
    cells = [[text(row) for text in columns.values()] for row in rows]
    used = [any(column) for column in zip(*cells)]
    keep = lambda values: [value for value, wanted in zip(values, used) if wanted]
    present = [row for row, raw in zip(cells, rows) if "missing" not in raw]
    missing = [
        f"* {row['candidate']}, {row['case']}, {row['of']}: {row['missing']}"
        for row in rows
        if "missing" in row
    ]
    heading = ["Missing:", ""] if missing else []
    return [*_table(keep(columns), map(keep, present)), "", *heading, *missing]


def _same_rounds(row: Row) -> Row:
    """The row, if it was timed beside the first row of its case."""
    return {} if "behind" in row else row


def _name(row: Row) -> str:
    name = row["candidate"]
    if row.get("chosen"):
        return f"**{name}** (the tuner's pick)"
    if name.endswith("tuned") and "options" in row:
        return f"{name}: {', '.join(f'{k}={v!r}' for k, v in row['options'].items())}"
    return name


def _step(row: Row) -> float | None:
    return row["seconds"] if "first_seconds" in row else None


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value / unit)


def roofline(row: Row, ceilings: dict[str, float]) -> float | None:
    """The time that the machine's ceilings allow at best, over the time taken."""
    if "flops" not in row or "seconds" not in row or not ceilings:
        return None
    arithmetic = row["flops"] / ceilings[f"matmul {row['dtype']}"]
    return max(arithmetic, row["bytes"] / ceilings["copy"]) / row["seconds"]


def _table(header, rows) -> list[str]:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(header), line(["---"] * len(header)), *map(line, rows)]
