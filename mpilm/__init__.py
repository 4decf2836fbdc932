"""mpilm: language-model training over MPI."""

import sys

from mpilm.errors import print_uncaught_error

if sys.argv[0] == "-m":  # python -m mpilm.COMMAND, which has yet to be imported
    sys.excepthook = print_uncaught_error
__version__ = "0.1.0"
