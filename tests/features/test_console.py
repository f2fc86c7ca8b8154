"""What commands print, and how they end."""

import errno
from dataclasses import dataclass

import pytest

from features.console import print_table, run_command
from features.errors import BadInputError


@dataclass(frozen=True)
class Options:
    number: int = 0


def test_no_cell_of_a_table_is_cut(capsys):
    long = "0.123456789012345678901234567890"
    print_table("title", [f"column {i}" for i in range(9)], [[long] * 9])
    assert capsys.readouterr().out.count(long) == 9


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (BadInputError("catalog.parquet: column 'title' is missing"), 2, "'title' is missing"),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 2, "the disk is full: out"),
        (FileNotFoundError(errno.ENOENT, "No such file", "in"), 2, "No such file: in"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("Query interrupted"), 130, "interrupted"),
    ],
)
def test_errors_become_one_sentence_and_a_status(capsys, error, status, said):
    def action(options):
        raise error

    assert run_command(Options, action, prog="job", arguments=[]) == status
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError])
def test_other_errors_are_not_hidden(error):
    def action(options):
        raise error

    with pytest.raises(error):
        run_command(Options, action, prog="job", arguments=[])


def test_options_reach_the_action():
    seen = []
    assert run_command(Options, seen.append, prog="job", arguments=["--number", "3"]) == 0
    assert seen == [Options(number=3)]
