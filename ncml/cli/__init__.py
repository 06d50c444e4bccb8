"""The command line: a module for each command, with one function whose signature and docstring tyro parses.

Results go to stdout, progress and errors to stderr. Modules import torch inside functions only, so that `--help` is
fast. Read `main.py` first.
"""
