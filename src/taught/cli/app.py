"""The command ``taught``: it runs one command and turns what goes wrong into a message and an exit code.

Exit codes: 0 done, 1 a defect of ours (with traceback), 2 the user's mistake (without), 130 Ctrl-C.
Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn, cast

from cyclopts import App, CycloptsError

import taught
from taught.cli import commands
from taught.cli.console import complain, err
from taught.environment import keep_freed_memory
from taught.errors import TaughtError, UserError, out_of_memory
from taught.stages import BY_NAME

app = App(
    name="taught",
    help="Which training examples taught a model a behavior, and through which of its features.",
    version=taught.__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
for order, command in enumerate(commands.COMMANDS):
    app.command(command, sort_key=order)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    # Read as torch is loaded: threads that spin while they wait take a busy machine's cores (benchmarks.wait_policy).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    sys.exit(run_command(sys.argv[1:] if argv is None else argv))


def run_command(argv: Sequence[str]) -> int:
    """Run one command; the exit code."""
    try:
        return cast(int, app(spelled_out(argv), exit_on_error=False, print_error=False) or 0)
    except CycloptsError as error:
        complain(str(error), "`taught --help` and `taught COMMAND --help` list what there is")
        return UserError.exit_code
    except TaughtError as error:
        complain(str(error))
        return error.exit_code
    except BrokenPipeError:  # `taught show RUN | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory(error):
            raise
        rule = "`taught check STUDY` says how much a study needs"
        fix = "lower attribution.memory_gb or attribution.batch_tokens by --set; finished work is kept, and goes on"
        complain(str(UserError("the memory does not suffice", value=str(error) or None, rule=rule, fix=fix)))
        return UserError.exit_code
    except KeyboardInterrupt:
        err().print("stopped; finished work is kept; the same command resumes")
        return 130


def spelled_out(argv: Sequence[str]) -> list[str]:
    """The arguments with ``--fresh`` followed by what it is about: a stage, or ``all``."""
    pairs = zip(argv, [*argv[1:], ""], strict=True)
    return ["--fresh=all" if word == "--fresh" and following not in BY_NAME else word for word, following in pairs]
