"""The commands that watch runs: `metrics`, and `mirror`, which passes what runs measure on to other programs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mongotorch.cli.logs import LogFormat, LogLevel, logging_to_stderr
from mongotorch.cli.output import AsJson, Uri, described, iso, opened, print_json, print_table

if TYPE_CHECKING:
    from mongotorch.jobs import MetricRow, RunMetrics


def metrics(
    uuid: str,
    follow: Annotated[bool, typer.Option("--follow", help="Print new rows until the run has ended.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the curves of a value in the terminal.")] = False,
    value: Annotated[str, typer.Option(help="The value that is drawn.")] = "objective",
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """What a run has measured, by the uuid of its job or of a version: training, and validations."""
    with opened(uri) as db:
        found = db.metrics(uuid)
        if as_json and not follow:
            print_json([row._asdict() for row in found])
            return
        if follow:
            _print_lines(found.rows, as_json=as_json)
            _print_lines(found.follow(), as_json=as_json)
            found = db.metrics(uuid) if plot else found
        elif not plot:
            _print_rows(found)
    if plot and not as_json:
        typer.echo(curves(found, value))


def _print_rows(found: RunMetrics) -> None:
    names = found.names
    rows = [(row.step, row.kind, *(_cell(row, name) for name in names), iso(row.time)) for row in found]
    print_table(("step", "kind", *names, "time"), rows)


def _cell(row: MetricRow, name: str) -> str:
    return f"{row.values[name]:.5g}" if name in row.values else ""


def _print_lines(rows: Iterable[MetricRow], *, as_json: bool) -> None:
    """Print each row when it comes: a line for people, or a JSON object on a line of its own."""
    for row in rows:
        if as_json:
            print_json(row._asdict(), indent=None)
        else:
            values = "  ".join(f"{name} {_cell(row, name)}" for name in row.values)
            typer.echo(f"{iso(row.time)}  step {row.step}  {row.kind}  {values}")


def curves(found: RunMetrics, value: str, *, height: int = 20) -> str:
    """The curves of a value, as wide as the terminal: training as a line of dots, validations as `o`."""
    curves = {kind: found.curve(value, kind) for kind in ("train", "valid")}
    pairs = [pair for steps, values in curves.values() for pair in zip(steps, values, strict=True)]
    pairs = [(step, number) for step, number in pairs if math.isfinite(number)]
    if not pairs:
        return f"no {value} of job {found.job}; there are {', '.join(found.names) or 'no rows'}"
    size = shutil.get_terminal_size()
    canvas = _Canvas(pairs, width=max(min(size.columns, 120) - 12, 10), height=max(min(size.lines - 5, height), 4))
    canvas.draw_dots(*curves["train"])
    canvas.draw_letters(*curves["valid"], letter="o")
    title = f"{value} of job {found.job}: train \N{BRAILLE PATTERN DOTS-1}, valid o"
    return "\n".join([title, *canvas.lines()])


class _Canvas:
    """A grid of characters over a range of steps and values; a character has 2 x 4 dots (braille patterns).

    Args:
        pairs: Steps and values, of which the range is.
        width: Characters in a line.
        height: Lines.
    """

    _DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))

    def __init__(self, pairs: Sequence[tuple[int, float]], *, width: int, height: int) -> None:
        steps, values = zip(*pairs, strict=True)
        self._steps, self._values = (min(steps), max(steps)), (min(values), max(values))
        self._width, self._height = width, height
        self._dots = [[0] * width for _ in range(height)]
        self._letters: dict[tuple[int, int], str] = {}

    def draw_dots(self, steps: Sequence[int], values: Sequence[float]) -> None:
        """Set the dot of each step and value."""
        for step, value in zip(steps, values, strict=True):
            if math.isfinite(value):
                x, y = self._at(step, value, 2 * self._width, 4 * self._height)
                self._dots[y // 4][x // 2] |= self._DOTS[x % 2][y % 4]

    def draw_letters(self, steps: Sequence[int], values: Sequence[float], *, letter: str) -> None:
        """Put a letter at each step and value."""
        for step, value in zip(steps, values, strict=True):
            if math.isfinite(value):
                self._letters[self._at(step, value, self._width, self._height)] = letter

    def lines(self) -> list[str]:
        """The grid with its axes."""
        low, high = self._values
        found = []
        for y, row in enumerate(self._dots):
            cells = [self._letters.get((x, y), chr(0x2800 + dots) if dots else " ") for x, dots in enumerate(row)]
            label = f"{high:.4g}" if y == 0 else f"{low:.4g}" if y == self._height - 1 else ""
            found.append(f"{label:>10} |" + "".join(cells).rstrip())
        first, last = map(str, self._steps)
        under = first + last.rjust(self._width - len(first))
        return [*found, " " * 11 + "+" + "-" * self._width, " " * 12 + under]

    def _at(self, step: int, value: float, width: int, height: int) -> tuple[int, int]:
        (first, last), (low, high) = self._steps, self._values
        x = (step - first) / (last - first) if last > first else 0.0
        y = (high - value) / (high - low) if high > low else 0.5
        return min(int(x * width), width - 1), min(int(y * height), height - 1)


def mirror(
    to: Annotated[
        str, typer.Option(help="tensorboard:DIR, mlflow:URI, wandb:PROJECT, webhook:URL, or one of a package.")
    ],
    once: Annotated[bool, typer.Option(help="Pass on what there is by now, and end.")] = False,
    every: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 1.0,
    log_level: Annotated[LogLevel, typer.Option(help="What is logged, on stderr.")] = LogLevel.info,
    log_format: Annotated[
        LogFormat, typer.Option(help="Lines for people, or one JSON object each.")
    ] = LogFormat.text,
    uri: Uri = None,
) -> None:
    """Pass on what runs measure to another program, until SIGTERM or Ctrl-C; killed and started again, it goes on.

    Runs and workers need nothing for it, and no failure of the other program can slow or end them.
    """
    from mongotorch.mirrors import Mirroring, open_mirror

    with (
        logging_to_stderr(log_level.value, log_format.value),
        opened(uri) as db,
        open_mirror(to, db) as target,
    ):
        if once:
            typer.echo(f"{target.update(db)} row(s) or event(s) passed on")
            return
        typer.echo(f"mirroring {described(db)} to {target.name}")
        Mirroring(db, target, every_s=every).run()
