"""Experiments on the built-in corpus: quickstart, training of the shipped models, the claims."""
