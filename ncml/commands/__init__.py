"""The commands of `ncml`: a module for each, with one function that tyro parses from its signature and docstring.

Results go to standard output, progress and errors to standard error. torch is imported inside functions only.
"""
