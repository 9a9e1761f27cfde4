"""Mode `passages`: a corpus, tokenised once into a passages folder."""

from pathlib import Path

from glimmer_jax.corpus import read_corpus
from glimmer_jax.data.vocabulary import Vocabulary
from glimmer_jax.modes import checks
from glimmer_jax.passages import write_passages

BUILT_IN = "pydocs"


def passages(
    corpus: str,
    passages_dir: str,
    max_length: int,
    vocabulary: Vocabulary = Vocabulary(),
    corpus_dir: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes `passages_dir`.

    Args:
      corpus: a JSON Lines file of `{"id", "title", "text", …}`, or `pydocs` for the documentation
        that this Python carries.
      passages_dir: the folder to write.
      max_length: tokens of a passage at most, end token included; longer ones are cut and counted.
      vocabulary: that of the model.
      corpus_dir: where `pydocs` writes its corpus and `questions/<task>-<split>.jsonl`.
      overwrite: replace an existing folder.

    Raises:
      ValueError: missing settings or files, bad lines, or the folder exists.
    """
    checks.required(CORPUS=corpus, PASSAGES_DIR=passages_dir)
    if corpus == BUILT_IN:
        checks.required(CORPUS_DIR=corpus_dir)
        from glimmer_jax.data import pydocs_files

        counts = pydocs_files.write_corpus(str(corpus_dir))
        for name, count in counts.items():
            print(f"{Path(str(corpus_dir)) / name}: {count} lines")
        source = Path(str(corpus_dir)) / "corpus.jsonl"
    else:
        source = checks.existing_file("CORPUS", corpus)
    manifest = write_passages(
        passages_dir,
        read_corpus(source),
        vocabulary.encode,
        vocabulary.fingerprint,
        max_length,
        vocab_size=vocabulary.vocab_size,
        eos_id=vocabulary.eos_id,
        source=source.name,
        overwrite=overwrite,
    )
    print(
        f"{passages_dir}: {manifest['num_passages']} passages, {manifest['num_tokens']} tokens; "
        f"{manifest['num_truncated']} were cut at {max_length} tokens."
    )
