"""Start and end of the commands that run in one process, without MPI and torch."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from mpilm.errors import UserError, is_first_process


def run_local(main: Callable[[], Callable[[], None]]) -> NoReturn:
    """Run a command and exit with its code. `main` parses the command line and returns the function to call. Of the processes
    that a launcher starts, the first one alone prints."""
    code = 0
    if not is_first_process():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        main()()
        sys.stdout.flush()
    except UserError as error:
        print(f"mpilm: error: {error}", file=sys.stderr)
        code = error.code
    except SystemExit as stop:
        if len(stop.args) != 2:
            raise
        text, code = stop.args  # the help text, from parse
        print(text, end="", file=sys.stderr if code else sys.stdout)
    except BrokenPipeError:
        os._exit(141)  # the reader has gone, as in `| head`; flushing at exit would raise again
    sys.exit(code)
