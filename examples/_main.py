"""An example from the command line to its last line of output."""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from _checkpoints import (
    Checkpoints,
    checksum,
    claimed,
    refuse_existing,
    write_atomically,
)
from _display import Point, save_curve
from _options import (
    InputError,
    Settings,
    SettingsType,
    parse_settings,
    resume_command,
)
from _problem import Baselines, Problem, Quantities
from _training import Run, train


def run_example(
    problem: Callable[[SettingsType], Problem],
    settings: type[SettingsType],
    arguments: list[str],
) -> int:
    """Trains a problem and reports; `sys.exit` takes what it returns.

    Returns:
      0; 2 if what the user gave cannot be used; 130 after Ctrl-C.
    """

    def program(chosen: SettingsType, console: Console) -> None:
        run = Run(problem(chosen), chosen, open_checkpoints(chosen))
        say_where(chosen, int(run.state.step))
        train(run, console)
        report(run, console)

    description = (inspect.getdoc(problem) or "").split("\n")[0]
    return run_program(program, settings, arguments, description)


def run_program(
    program: Callable[[SettingsType, Console], None],
    settings: type[SettingsType],
    arguments: list[str],
    description: str,
) -> int:
    """Runs a program that goes on with `--resume`; returns as `run_example`."""
    chosen = parse_settings(arguments, settings, description)
    try:
        with claimed(chosen.out):
            program(chosen, Console())
    except KeyboardInterrupt:
        print("\nInterrupted. Go on with:", resume_command(sys.argv[0], arguments))
        return 130
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def say_where(settings: Settings, step: int) -> None:
    if settings.resume:
        print(f"Goes on from step {step} of {settings.steps}.")


def open_checkpoints(settings: Settings) -> Checkpoints:
    """The checkpoints of the run to go on with; a new run has none yet."""
    checkpoints = Checkpoints(settings.out / "checkpoints")
    if checkpoints.latest is not None and not settings.resume:
        refuse_existing(settings.out)
    return checkpoints


def report(run: Run, console: Console) -> None:
    """Shows what the problem has to show, and says where everything is."""
    problem, out = run.problem, run.settings.out
    curve = save_curves(out, run.curve, problem.quantities, problem.baselines)
    problem.report(run.state.params, console, out)
    print(f"learning curve  {curve}")
    print(f"checkpoint      {run.checkpoints.path()}")
    print(f"parameters      {checksum(run.state.params)}")


def save_curves(
    out: Path, curve: list[Point], quantities: Quantities, baselines: Baselines
) -> str:
    """Draws the learning curve and writes its numbers; returns where they are."""
    plot, numbers = out / "learning_curve.png", out / "learning_curve.json"
    save_curve(plot, curve, quantities, baselines)
    content = json.dumps({"baselines": baselines, "curve": curve}, indent=1)
    write_atomically(numbers, lambda file: file.write(content.encode()))
    return f"{plot} ({numbers.name})"
