"""Prepare the data of a run, whether it has one corpus or a mixture of sources."""

from msa_train.config import RunConfig
from msa_train.data.mixture.sources import prepare_mixture
from msa_train.data.mixture.stages import MixedStages
from msa_train.data.prepare import Corpus, Log, prepare_corpus


def prepare_run(config: RunConfig, *, log: Log | None = None) -> Corpus:
    """Check the data settings and build the token files that are missing; see `prepare_corpus`.

    Raises:
        ValueError: one line naming the setting, what is wrong and the fix.
    """
    if config.data.mixture:
        return prepare_mixture(config, log=log)
    return prepare_corpus(config.data, vocab_size=config.model.vocab_size, log=log, run_dir=config.run_dir)


def load_mixture(config: RunConfig, prepared: Corpus | None = None) -> tuple[Corpus, MixedStages]:
    """Load the packs of every stage of a run with a mixture.

    Args:
        config: the run.
        prepared: what `prepare_run` returned; None: the data are prepared here, as in tests.

    Raises:
        ValueError: one line naming the setting, what is wrong and the fix.
    """
    corpus = prepared or prepare_run(config)
    return corpus, MixedStages(config, corpus)
