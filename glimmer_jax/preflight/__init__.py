"""Compiles a job for an absent TPU slice, with XLA's TPU compiler on any machine."""
