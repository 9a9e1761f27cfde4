"""Experiments on the built-in corpus: the quickstart and the training of the shipped models."""
