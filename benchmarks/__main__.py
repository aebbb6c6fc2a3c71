"""Runs the benchmarks on whatever device JAX has; see benchmarks/README.md."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import machine, own, report
from benchmarks.compare import compare
from benchmarks.suites import SUITES, Settings, Task
from benchmarks.targets import answers


def main() -> None:
    options = _parse()
    # Times of compilation are those without a cache on the disk.
    jax.config.update("jax_enable_compilation_cache", False)
    if options.compare:
        text, console = "\n".join(compare(*options.compare)), Console()
        console.print(Markdown(text)) if console.is_terminal else print(text)
        return
    if options.function:
        rows = own.rows(options.function, options.budget)
        report.write_json(options.out, {"about": machine.about(), "rows": rows})
        return
    quick = options.suite == ["smoke"]
    results = _results(options, quick)
    suites = list(SUITES) if quick else options.suite
    settings = Settings(quick, options.trace)
    tasks = [(name, task) for name in suites for task in SUITES[name](settings)]
    with _progress() as bar:
        line = bar.add_task("benchmarks", total=len(tasks))
        tell = lambda text: bar.update(line, advance=1, description=text)
        try:
            _run(tasks, results, options.out, tell)
        except KeyboardInterrupt:
            message = f"Interrupted; with --resume it goes on from {options.out}."
            raise SystemExit(message) from None
    report.write(options.out, results)
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
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run that is in --out"
    )
    parser.add_argument(
        "function", nargs="?", metavar="MODULE:FUNCTION",
        help="instead of the suites: your own function, see benchmarks/own.py",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds for your own function"
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A.json", "B.json"),
        help="instead of a run: what has changed between two of them",
    )  # fmt: skip
    parser.add_argument(
        "--trace", type=Path, metavar="FOLDER",
        help="write a profile of one call of every candidate, for XProf or Perfetto",
    )  # fmt: skip
    options = parser.parse_args()
    if not options.budget > 0:
        parser.error(f"--budget must be positive, got {options.budget}.")
    if "smoke" in options.suite and len(options.suite) > 1:
        parser.error("smoke is a quick run of all suites; give it alone")
    return options


def _results(options: argparse.Namespace, quick: bool) -> dict[str, Any]:
    about = {**machine.about(), "quick": quick}
    if not options.resume:
        return {"about": about, "ceilings": machine.ceilings(quick), "rows": []}
    results = report.read(options.out)
    if results["about"] != about:
        raise SystemExit(
            f"--resume: {options.out} is a run of {results['about']}, this is {about}."
        )
    return results


def _run(
    tasks: list[tuple[str, Task]],
    results: dict[str, Any],
    out: Path,
    tell: Callable[[str], None],
) -> None:
    """Runs what is not among the results yet; after each task, the file has it."""
    done = {(row["suite"], row["case"], row["of"]) for row in results["rows"]}
    for suite, task in tasks:
        if (suite, task.case, task.of) not in done:
            rows = [{"suite": suite, **row} for row in task.run()]
            results["rows"] += rows
            report.write_json(out, results)
        tell(f"{suite}: {task.case}, {task.of}")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _show(results: dict[str, Any], out: Path) -> None:
    console = Console()
    for measure, target, figure, noise in answers(results["rows"]):
        text = f"{measure}\n  target: {target}\n  here:   {figure}"
        text += f"\n  noise:  {noise}" if noise else ""
        console.print(text, markup=False)
    missing = {row["candidate"] for row in results["rows"] if "missing" in row}
    if missing:
        console.print(f"Missing in some cases: {', '.join(sorted(missing))}")
    compared = sum("deviation" in row for row in results["rows"])
    console.print(f"{compared} results agree. Written to {out}/")


if __name__ == "__main__":
    main()
