"""Launchers: `python -m launch TARGET`.

The module of a target describes a launch as data (`plans.py`). Only `processes.py`, `lifecycle.py` and
`xm.py` start processes.
"""
