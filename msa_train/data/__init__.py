"""Turn the data settings into the packs of each step: corpora, tokenizers, packing."""

from msa_train.data.dataset import BatchStream, PackedDataset
from msa_train.data.load import load_datasets
from msa_train.data.packing import IGNORE_LABEL, Pack, Packs
from msa_train.data.prepare import Corpus, prepare_corpus

__all__ = [
    "IGNORE_LABEL",
    "BatchStream",
    "Corpus",
    "Pack",
    "PackedDataset",
    "Packs",
    "load_datasets",
    "prepare_corpus",
]
