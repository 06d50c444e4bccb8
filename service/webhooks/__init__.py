"""Webhooks: the service sends the end of a job to the address that its request named. Read `deliverer.py` first.

`targets.py` decides what a request may name, `addresses.py` what is contacted, and `sending.py` makes one attempt.
"""
