"""``python -m difffit_fast`` is the command ``difffit``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
