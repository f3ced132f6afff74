"""Tables, progress and JSON: rich where stdout is a terminal, plain aligned text elsewhere."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch_mbv2.errors import Error
from torch_mbv2.measure.conditions import check_target

STDOUT = "-"
"""The FILE of `--json` that is stdout."""


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()
) -> None:
    """Print rows of cells under the names of their columns; those in `numbers` align right."""
    text = aligned(columns, rows, numbers)
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        table = Table(box=box.SIMPLE_HEAD)
        for column in columns:
            table.add_column(column, justify="right" if column in numbers else "left")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # Text: brackets are no markup
        # In a terminal that is too narrow rich would cut cells off; plain lines only wrap.
        if max(map(len, text.splitlines())) + len(columns) + 1 <= console.width:
            console.print(table)
            return
    print(text)


def aligned(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()
) -> str:
    """The table as text, two spaces between the columns."""
    lines = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def render(line: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([render(lines[0]), rule, *map(render, lines[1:])])


Cell = Callable[[Mapping[str, Any]], str]
"""What makes the text of a cell of a row as JSON has it."""


def number(key: str, form: str, unit: str = "") -> Cell:
    """The number of that key, formatted, with its unit; nothing for None."""
    return lambda row: "" if row[key] is None else f"{row[key]:{form}}{unit}"


def cells(columns: Mapping[str, Cell], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The cells of each column, one a row, without the columns that say nothing: memory on a CPU,
    say."""
    found = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    return {name: column for name, column in found.items() if any(column)}


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Print names and their values, one a line."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for name, value in pairs.items():
            table.add_row(Text(name, style="bold"), Text(value))
        Console().print(table)
        return
    width = max(map(len, pairs))
    for name, value in pairs.items():
        print(f"{name.ljust(width)}  {value}")


def note(text: str) -> None:
    """Say on stderr what the reader of the results must know."""
    sys.stdout.flush()
    print(f"torch-mbv2: note: {text}", file=sys.stderr)


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar where stderr is a terminal; yields what moves it on by one, saying why."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    shown = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*shown, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def check_json_path(path: str | None) -> None:
    """Raise Error now, before any work is done, if `emit` would fail later."""
    if path not in (None, STDOUT):
        check_target("--json", path)


def check_other_targets(path: str | None, flag: str, targets: Iterable[Path]) -> None:
    """Raise Error if the file of `--json` is one of those that another flag writes."""
    if path in (None, STDOUT):
        return
    if Path(path).resolve() in (target.resolve() for target in targets):
        raise Error(f"--json {path}: {flag} writes to this file, too")


def emit(path: str | None, data: Mapping[str, Any], show: Callable[[], None]) -> None:
    """Write `data` as JSON to the file `path`, if there is one, and call `show` to print it for
    people; or, if `path` is "-", print the JSON instead. NaN and infinities become null."""
    text = json.dumps(finite(data), indent=2, allow_nan=False)
    if path == STDOUT:
        print(text)
        return
    if path is not None:
        Path(path).write_text(text + "\n", encoding="utf-8")
    show()


def finite(data: Any) -> Any:
    """A copy of nested data as JSON has it: NaN and infinities are None, tuples lists."""
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
