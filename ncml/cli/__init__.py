"""The command line: a module for each command, with one function that tyro parses from its signature and docstring.

Results go to standard output, progress and errors to standard error; torch is imported inside functions only.
Read `main.py` first.
"""
