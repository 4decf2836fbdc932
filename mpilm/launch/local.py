"""Start and end of the commands that run in one process, without MPI and torch."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from mpilm.errors import UserError


def run_local(main: Callable[[], Callable[[], None]]) -> NoReturn:
    """Run a command and exit with its code. `main` parses the command line and returns the function to call."""
    code = 0
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
