"""What every command shares: arguments, exit status, progress and tables.

Results go to standard output, everything else to standard error.
"""

import errno
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from features.errors import BadInputError

Options = TypeVar("Options")

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
_WIDEST = 1000
_DUCKDB_INTERRUPTED = "Query interrupted"  # what it makes of Ctrl-C during a query

stdout = Console()
stderr = Console(stderr=True)


def run_command(
    options: type[Options],
    action: Callable[[Options], None],
    *,
    prog: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse ``arguments`` into ``options``, run ``action`` on them and return the exit status.

    Args:
        options: a dataclass; its docstring is the description that ``--help`` shows.
        action: does the work; a `BadInputError`, a full disk or a refused path becomes one
            sentence on standard error and status 2.
        prog: the command's name.
        arguments: what follows the command's name; the process's own where ``None``.
    """
    parsed = tyro.cli(options, prog=prog, args=arguments)
    try:
        action(parsed)
    except BadInputError as error:
        return _fail(prog, str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail(prog, f"the disk is full: {error.filename or error}; free space and rerun")
        if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError):
            return _fail(prog, f"{error.strerror}: {error.filename}")
        raise
    except KeyboardInterrupt:
        return _interrupted(prog)
    except RuntimeError as error:
        if _DUCKDB_INTERRUPTED not in str(error):
            raise
        return _interrupted(prog)
    return 0


def _interrupted(prog: str) -> int:
    sys.stderr.write(f"{prog}: interrupted; give the same command again to go on\n")
    return EXIT_INTERRUPTED


def _fail(prog: str, message: str) -> int:
    sys.stderr.write(f"{prog}: {message}\n")
    return EXIT_BAD_INPUT


def progress_bar(*extra: TextColumn) -> Progress:
    """Return a progress display with count, elapsed and remaining time on standard error.

    It is drawn on a terminal only; elsewhere it prints nothing.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *extra,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        disable=not stderr.is_terminal,
    )


def say(message: str) -> None:
    """Print one line of progress to standard error."""
    stderr.print(message, highlight=False, markup=False, soft_wrap=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print ``rows`` as a table on standard output; the first column is left-aligned.

    No cell is cut: a table wider than the terminal, or than what a pipe is taken for, stays whole.
    """
    table = Table(title=title, title_justify="left")
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    needed = Measurement.get(stdout, stdout.options.update(max_width=_WIDEST), table).maximum
    Console(file=stdout.file, width=max(needed, stdout.width)).print(table)
