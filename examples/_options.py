"""The command line of an example: a dataclass whose fields are the options."""

import argparse
import dataclasses
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar


class InputError(ValueError):
    """What the user gave cannot be used; the message says why and what to do."""


def positive_int(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def positive_float(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def seed(text: str) -> int:
    if not 0 <= (value := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**32 - 1, got {text}")
    return value


_CHECKED = {int: positive_int, float: positive_float}


def option(
    default: Any, text: str, *, same_on_resume: bool = True, **argument: Any
) -> Any:
    """A field of `Settings` that is an option of the command line.

    Args:
      default: an int or a float must be positive, unless `type` says otherwise.
      text: what `--help` says.
      same_on_resume: whether a run can only go on with the value it began with.
      **argument: of `ArgumentParser.add_argument`, as `type`, `nargs`, `choices`.
    """
    if checked := _CHECKED.get(type(default)):
        argument.setdefault("type", checked)
    metadata = {"argument": {"help": text, **argument}, "same": same_on_resume}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The options of every example and their defaults.

    An example's own settings derive from this. A bare `steps: int = 300` there is
    another default of the same option, a field with `option` is one more.
    """

    steps: int = option(1000, "steps of training")
    batch_size: int = option(32, "examples in a step")
    learning_rate: float = option(5e-3, "the highest of the schedule")
    seed: int = option(
        0, "of the parameters, the noise and the order of the data", type=seed
    )
    checkpoint_every: int = option(
        100, "steps from one checkpoint to the next", same_on_resume=False
    )
    out: Path = option(
        Path("runs"),
        "folder of the checkpoints and the results",
        same_on_resume=False,
        type=Path,
    )
    resume: bool = option(
        False,
        "go on from the newest checkpoint in --out",
        same_on_resume=False,
        action="store_true",
    )

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on, by option."""
        return {
            _flag(field.name): getattr(self, field.name)
            for field in dataclasses.fields(self)
            if _metadata(type(self), field.name)["same"]
        }


SettingsType = TypeVar("SettingsType", bound=Settings)


def parse_settings(
    arguments: list[str], settings: type[SettingsType], description: str
) -> SettingsType:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for field in dataclasses.fields(settings):
        argument = _metadata(settings, field.name)["argument"]
        parser.add_argument(_flag(field.name), default=field.default, **argument)
    return settings(**vars(parser.parse_args(arguments)))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metadata(settings: type[Settings], name: str) -> Mapping[str, Any]:
    """Of the nearest class that has it: another default alone changes none of it."""
    fields = (vars(kind)["__dataclass_fields__"][name] for kind in settings.__mro__)
    return next(field.metadata for field in fields if field.metadata)


def resume_command(script: str, arguments: list[str]) -> str:
    rest = [argument for argument in arguments if argument != "--resume"]
    return shlex.join(["python", script, *rest, "--resume"])
