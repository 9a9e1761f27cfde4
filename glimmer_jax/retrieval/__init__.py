"""Retrieval: BM25 over a passages folder."""
