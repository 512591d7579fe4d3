"""An index of a corpus: each sample's projected gradient on disk, in the data's order, to be searched and looked at."""

from ghostfunc.index._batches import token_batches
from ghostfunc.index._build import build_index
from ghostfunc.index._faiss import FaissIndex, faiss_search
from ghostfunc.index._gram import GramPreconditioner, inverse_gram
from ghostfunc.index._manifest import StoreError
from ghostfunc.index._models import Model, load_model, model_fingerprint, packaged_weights
from ghostfunc.index._queries import Queries, project_queries
from ghostfunc.index._scan import Hits
from ghostfunc.index._score import score_corpus
from ghostfunc.index._search import Ends, rows_of_domain, search, search_ends, search_layers, stream_scores
from ghostfunc.index._shards import Shard
from ghostfunc.index._store import Store
from ghostfunc.index._writer import Source, StoreWriter

__all__ = [
    "Ends",
    "FaissIndex",
    "GramPreconditioner",
    "Hits",
    "Model",
    "Queries",
    "Shard",
    "Source",
    "Store",
    "StoreError",
    "StoreWriter",
    "build_index",
    "faiss_search",
    "inverse_gram",
    "load_model",
    "model_fingerprint",
    "packaged_weights",
    "project_queries",
    "rows_of_domain",
    "score_corpus",
    "search",
    "search_ends",
    "search_layers",
    "stream_scores",
    "token_batches",
]
