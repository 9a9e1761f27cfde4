"""Serving: a checkpoint with its memory or its passages, from questions to answers."""
