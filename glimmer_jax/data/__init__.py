"""The data wing: built-in corpus, KILT files, vocabulary, seqio pieces, scoring."""
