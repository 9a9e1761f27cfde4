"""Mode `passages`: tokenises a corpus once into a passages folder."""

import logging
import os
import shlex
from pathlib import Path

from glimmer_jax.corpus import beam
from glimmer_jax.corpus.files import find_files
from glimmer_jax.corpus.manifest import MANIFEST
from glimmer_jax.corpus.passages_writer import check_absent, write_passages
from glimmer_jax.corpus.reading import Reading, read_passages
from glimmer_jax.corpus.report import Report
from glimmer_jax.modes import checks, outputs
from glimmer_jax.storage.folder import local
from glimmer_jax.weights.find_vocabulary import find_vocabulary

logger = logging.getLogger(__name__)

BUILT_IN = "pydocs"
# Share of tokens that the vocabulary cannot spell, above which a warning is logged.
MAX_UNKNOWN = 0.01


def passages(
    corpus: str,
    passages_dir: str,
    max_length: int,
    vocabulary: str | None = None,
    corpus_dir: str | None = None,
    overwrite: bool = False,
    reading: Reading = Reading(),
    beam_options: str | None = None,
) -> None:
    """Writes `passages_dir`.

    Args:
      corpus: a file, or a pattern of files, in a format of `glimmer_jax.corpus.formats`; or `pydocs`
        for the documentation of this Python.
      passages_dir: the folder to write.
      max_length: most tokens of a passage, end token included; longer ones are truncated and counted.
      vocabulary: `Vocabulary.path`, the model's.
      corpus_dir: where `pydocs` writes its corpus and `questions/<task>-<split>.jsonl`, and Beam its
        shards.
      overwrite: replace existing folders.
      reading: format of the corpus, words per passage, and what to do with invalid lines.
      beam_options: flags of Apache Beam, which then reads the corpus in many processes; None reads it
        in this one.

    Raises:
      ValueError: missing settings or files, invalid lines, an unfit vocabulary, or the folder exists.
    """
    checks.required(CORPUS=corpus, PASSAGES_DIR=passages_dir)
    local("PASSAGES_DIR", passages_dir)
    place = outputs.Place(
        passages_dir,
        os.path.join(passages_dir, MANIFEST),
        lambda: check_absent(passages_dir, overwrite),
    )
    place.check_early()
    text = find_vocabulary(vocabulary)
    unk_id = text.unk_id  # An unfit vocabulary is rejected before the corpus is read.
    with outputs.sole_writer(place) as held:
        if held.complete:
            return
        if corpus == BUILT_IN:
            checks.required(CORPUS_DIR=corpus_dir)
            from glimmer_jax.pydocs import corpus_files

            counts = corpus_files.write_corpus(str(corpus_dir))
            for name, count in counts.items():
                print(f"{Path(str(corpus_dir)) / name}: {count} lines")
            corpus = str(Path(str(corpus_dir)) / "corpus.jsonl")
        paths, report = find_files(corpus), Report()
        if beam_options is not None:
            checks.required(CORPUS_DIR=corpus_dir)
            try:
                options = shlex.split(beam_options)
            except ValueError as error:
                raise ValueError(
                    f"BEAM_OPTIONS: {error}, in {beam_options!r}. Write flags as on a command line."
                ) from error
            paths, report = beam.write_passages(
                paths, str(corpus_dir), reading, options, overwrite=overwrite
            )
            print(f"{corpus_dir}: {len(paths)} shards\n{report.summary()}")
            reading, report = Reading(), Report()
        manifest = write_passages(
            passages_dir,
            read_passages(paths, reading, report),
            text.encode,
            text.fingerprint,
            max_length,
            vocab_size=text.vocab_size,
            eos_id=text.eos_id,
            unk_id=unk_id,
            source=Path(corpus).name,
            overwrite=overwrite,
            before=held.check_lock,
        )
    print(
        f"{report.summary()}\n{passages_dir}: {manifest['num_passages']} passages, "
        f"{manifest['num_tokens']} tokens; {manifest['num_truncated']} were truncated at {max_length} "
        f"tokens; {manifest['num_unknown']} tokens are unknown to the vocabulary."
    )
    if manifest["num_unknown"] > MAX_UNKNOWN * manifest["num_tokens"]:
        logger.warning(
            "VOCABULARY: %.1f %% of the tokens of %s are unknown to %s. The model cannot read them; give "
            "a vocabulary that covers the corpus's language.",
            100 * manifest["num_unknown"] / manifest["num_tokens"], passages_dir, text.path,
        )  # fmt: skip
