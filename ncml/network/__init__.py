"""The network, its likelihood and the noising SDE: what one forward pass computes.

Imports no sampler, no statistic and no file access. Read `ncpn.py` first.
"""
