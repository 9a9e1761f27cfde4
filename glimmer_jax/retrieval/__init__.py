"""Retrieval: BM25, dense GTR with an exact search, and both as one, over a passages folder."""
