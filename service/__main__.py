"""`python -m service`."""

import tyro

from service.server import main

tyro.cli(main)
