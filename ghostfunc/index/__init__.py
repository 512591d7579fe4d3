"""An index of a corpus: each sample's projected gradient on disk, in the data's order, to be searched and looked at."""

from ghostfunc.index._manifest import StoreError
from ghostfunc.index._shards import Shard
from ghostfunc.index._store import Store
from ghostfunc.index._writer import Source, StoreWriter

__all__ = ["Shard", "Source", "Store", "StoreError", "StoreWriter"]
