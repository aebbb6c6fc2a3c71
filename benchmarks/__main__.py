"""Runs the benchmarks on whatever device JAX has; see benchmarks/README.md."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import machine, report
from benchmarks.suites import SUITES, Settings, smoke
from benchmarks.targets import answers


def main() -> None:
    options = _parse()
    quick = options.suite == ["smoke"]
    results: dict[str, Any] = {"about": machine.about(), "rows": []}
    with _progress() as bar:
        task = bar.add_task("the machine's ceilings")
        results["ceilings"] = machine.ceilings(quick)
        try:
            for name in options.suite:
                _run(name, results, lambda text: bar.update(task, description=text))
                # After each suite: what is measured stays, whatever comes.
                report.write(options.out, results)
        except KeyboardInterrupt:
            report.write(options.out, results)
            message = f"Interrupted; {options.out} has what was measured."
            raise SystemExit(message) from None
    _show(results, options.out)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known = [*SUITES, "smoke"]
    parser.add_argument(
        "--suite", nargs="+", choices=known, default=list(SUITES), metavar="SUITE",
        help=f"one or more of {', '.join(known)}; all but smoke by default",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("benchmark-results"), help="folder to write to"
    )
    options = parser.parse_args()
    if "smoke" in options.suite and len(options.suite) > 1:
        parser.error("smoke is all suites in small; give it alone")
    return options


def _run(name: str, results: dict[str, Any], tell) -> None:
    suite = smoke if name == "smoke" else SUITES[name]
    for row in suite(Settings(quick=name == "smoke")):
        tell(f"{name}: {row['case']}, {row['of']}")
        results["rows"].append({"suite": name, **row})


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _show(results: dict[str, Any], out: Path) -> None:
    console = Console()
    for measure, target, figure in answers(results["rows"]):
        console.print(
            f"{measure}\n  target: {target}\n  here:   {figure}", markup=False
        )
    missing = {row["candidate"] for row in results["rows"] if "missing" in row}
    if missing:
        console.print(f"Missing in some cases: {', '.join(sorted(missing))}")
    compared = sum("deviation" in row for row in results["rows"])
    console.print(f"{compared} results agree. Written to {out}/")


if __name__ == "__main__":
    main()
