"""Text: documents out of files, tokens out of documents, samples out of tokens."""

from ghostfunc.text._corpus import Corpus
from ghostfunc.text._documents import Document
from ghostfunc.text._layout import SPLITS, TOKEN, domain_file, domain_file_name, split_folder
from ghostfunc.text._open import open_corpus
from ghostfunc.text._sources import PILE, Source, open_sources
from ghostfunc.text._text_corpus import TextCorpus
from ghostfunc.text._token_corpus import TokenCorpus
from ghostfunc.text._tokenize import HELD_OUT_FRACTION, Progress, cut_split, require_token_files, token_table, tokenize
from ghostfunc.text._tokenizers import PACKAGED_TOKENIZER, load_tokenizer

__all__ = [
    "HELD_OUT_FRACTION",
    "PACKAGED_TOKENIZER",
    "PILE",
    "SPLITS",
    "TOKEN",
    "Corpus",
    "Document",
    "Progress",
    "Source",
    "TextCorpus",
    "TokenCorpus",
    "cut_split",
    "domain_file",
    "domain_file_name",
    "load_tokenizer",
    "open_corpus",
    "open_sources",
    "require_token_files",
    "split_folder",
    "token_table",
    "tokenize",
]
