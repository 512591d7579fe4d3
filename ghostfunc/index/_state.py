"""The state of a store: what a file that was made from its rows is checked against before it is used."""

import hashlib

from ghostfunc.index._store import Store


def state_of(store: Store) -> str:
    """Hexadecimal sha256 of a store's identity and of the records of its shards, which name their files' checksums."""
    digest = hashlib.sha256(store.manifest["identity"].encode())
    for stored in store._shards:
        digest.update(stored.files.record.read_bytes())
    return digest.hexdigest()
