"""Commands that start other commands: `python -m launch TARGET`, and the quickstart.

A target's module says as data what would be done (`plans.py`); only `processes.py`, `lifecycle.py`
and `xm.py` start anything.
"""
