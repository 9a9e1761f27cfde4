"""Run modes: one plain function each, configured by gin and called by `glimmer_jax.main`.

Checks come first and cheap ones before others, so that a wrong path or length ends a job in seconds.
"""
