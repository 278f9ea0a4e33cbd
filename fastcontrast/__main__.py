"""``python -m fastcontrast``: the same as the ``fastcontrast`` command."""

import sys

from fastcontrast.cli import main

if __name__ == "__main__":
    sys.exit(main())
