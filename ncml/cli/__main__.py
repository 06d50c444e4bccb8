"""Entry point of `python -m ncml.cli`."""

import sys

from ncml.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
