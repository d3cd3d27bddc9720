"""What the commands share: options, reading MODEL and inputs, where results and errors go."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from .errors import BudgetError, VramkitError

EXIT_ERROR, EXIT_BUDGET = 1, 3

json_option = click.option(
    "--json", "json_path", metavar="PATH|-", help="Write the result as JSON to PATH, or to stdout."
)
factory_option = click.option(
    "--factory",
    metavar="PACKAGE.MODULE:FUNCTION",
    help="Builds the module, where MODEL is a safetensors file or a folder without config.json.",
)
inputs_option = click.option(
    "--inputs",
    "inputs",
    multiple=True,
    metavar="[NAME=]2x128[:int64]",
    help="Shape of one input of a call; repeat for each. Without NAME: positional.",
)
limit_option = click.option("--vram-limit", required=True, help='"6 GB", "512 MiB", or GiB.')
buffer_option = click.option("--vram-buffer", default="0 B", show_default=True)
skip_option = click.option("--skip", multiple=True, help="A layer to leave plain (name or glob).")


class Output:
    """Where a command's result goes: tables to the terminal, JSON to where the user said."""

    def __init__(self, json_path: str | None) -> None:
        self.json_path = json_path
        self.console = Console(stderr=json_path == "-")

    def finish(self, data: dict[str, Any]) -> None:
        """Write the JSON, if it was asked for."""
        if self.json_path == "-":
            click.echo(json.dumps(data, indent=2))
        elif self.json_path:
            Path(self.json_path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextmanager
def reported(json_path: str | None) -> Iterator[Output]:
    """Turns the library's errors into a sentence and an exit code."""
    output = Output(json_path)
    try:
        yield output
    except BudgetError as error:
        output.console.print(f"[red]does not fit:[/red] {error}", highlight=False)
        output.finish({"error": str(error), "needed_bytes": error.needed_bytes})
        sys.exit(EXIT_BUDGET)
    except (VramkitError, ValueError, TypeError, OSError, ImportError) as error:
        output.console.print(f"[red]error:[/red] {error}", highlight=False)
        output.finish({"error": str(error)})
        sys.exit(EXIT_ERROR)


def parse_inputs(texts: tuple[str, ...]) -> Any:
    """`["input_ids=2x128", "x=1x3x64x64:float16"]` as the inputs of `vramkit.estimate`."""
    if not texts:
        return None
    named: dict[str, Any] = {}
    positional: list[Any] = []
    for text in texts:
        match = re.fullmatch(r"(?:(\w+)=)?(\d+(?:x\d+)*)(?::(\w+))?", text)
        if match is None:
            raise ValueError(
                f"cannot read the input {text!r}; write NAME=2x128 or NAME=2x128:int64"
            )
        name, shape_text, dtype = match.groups()
        shape: Any = tuple(int(n) for n in shape_text.split("x"))
        value = (dtype, shape) if dtype else shape
        if name:
            named[name] = value
        else:
            positional.append(value)
    if named and positional:
        raise ValueError("name all inputs or none")
    return named or tuple(positional)


def entry_point(text: str) -> Callable[[], Any]:
    """The function that `package.module:function` names."""
    module_name, _, function = text.partition(":")
    if not module_name or not function:
        raise ValueError(f"expected package.module:function, got {text!r}")
    sys.path.insert(0, "")  # modules in the folder one works in, as `python -m` finds them
    try:
        found = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot find {text!r}: {error}") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise ValueError(f"{text!r} is not a function that returns a module")
    return found  # type: ignore[no-any-return]


def is_entry_point(model: str) -> bool:
    """Whether MODEL is package.module:function, and no file of that name."""
    return not Path(model).exists() and re.fullmatch(r"[\w.]+:\w+", model) is not None


def module_or_path(model: str, factory: str | None) -> tuple[Any, Callable[[], Any] | None]:
    """(module, None) for an entry point, (path, factory) for a checkpoint."""
    if is_entry_point(model):
        return entry_point(model)(), None
    if not Path(model).exists():
        raise FileNotFoundError(
            f"no model at {model!r}: give a checkpoint folder, a safetensors file with --factory, "
            "or package.module:function"
        )
    if Path(model).is_file() and factory is None:
        raise ValueError(f"{model} holds weights only: say what model they are with --factory")
    return Path(model), entry_point(factory) if factory else None


def size_option_value(text: str | None) -> Any:
    """A size as the library takes it: a bare number is GiB."""
    return float(text) if text is not None and re.fullmatch(r"[0-9.]+", text) else text
