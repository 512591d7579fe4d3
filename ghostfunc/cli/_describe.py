"""What an index is, as JSON and in words: the end of `index`, and `explain` of a folder."""

from __future__ import annotations

from typing import Any

from ghostfunc.cli._console import one_line
from ghostfunc.index import Store

_SHOWN = 12  # hexadecimal digits of a fingerprint


def describe(store: Store) -> dict[str, Any]:
    """An index as JSON.

    Returns:
        `folder`, `rows`, `dim`, `dtype`, `complete`, `missing_rows`, `bytes`, `sources` (`{name: rows}`), `model`,
        `projection`, `settings`, `clipped` (the parameters too small for the rank) and `ghostfunc` (the version that
        began it).
    """
    parameters = store.manifest["projection"].get("parameters", {})
    return {
        "folder": str(store.folder),
        "rows": store.rows,
        "dim": store.dim,
        "dtype": store.dtype,
        "complete": store.complete,
        "missing_rows": sum(shard.stop - shard.start for _, shard in store.missing_shards),
        "bytes": sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file()),
        "sources": {name: len(rows) for name, rows in store.sources.items()},
        "model": store.manifest["model"],
        "projection": store.manifest["projection"],
        "settings": store.manifest["settings"],
        "clipped": [name for name, part in parameters.items() if part["clipped"]],
        "ghostfunc": store.manifest["ghostfunc"],
    }


def print_description(described: dict[str, Any]) -> None:
    """What `describe` gives, for people."""
    print(f"{described['folder']}: {described['rows']:,} rows of {described['dim']:,} numbers ({described['dtype']})")
    for name, fact in _facts(described):
        print(f"  {name:<12}{fact}")


def _facts(described: dict[str, Any]) -> list[tuple[str, str]]:
    model, projection = described["model"], described["projection"]
    state = "complete"
    if not described["complete"]:
        state = f"{described['missing_rows']:,} rows are yet to be written: the same command goes on"
    facts = [
        ("state", state),
        ("on disk", size(described["bytes"])),
        ("data", ", ".join(f"{one_line(name)} ({rows:,})" for name, rows in described["sources"].items())),
    ]
    if model:
        fingerprint = f" (fingerprint {model['fingerprint'][:_SHOWN]})" if "fingerprint" in model else ""
        facts.append(("model", f"{one_line(str(model.get('name', '')))}{fingerprint}".strip()))
    if "parameters" in projection:
        ranks = sorted({(part["k_in"], part["k_out"]) for part in projection["parameters"].values()})
        spread = " or ".join(f"{k_in} x {k_out}" for k_in, k_out in ranks[:3]) + (", ..." if len(ranks) > 3 else "")
        facts.append(("parameters", f"{len(projection['parameters'])}, each to {spread}"))
        facts.append(("projection", f"{projection['kind']}, rank {projection['rank']}, seed {projection['seed']}"))
    if described["clipped"]:
        names = described["clipped"]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        facts.append(("clipped", f"to small layers: {', '.join(names[:3])}{more}"))
    return facts


def size(count: int) -> str:
    """Bytes for people.

    Example:
        >>> size(999), size(1234567)
        ('999 bytes', '1.2 MB')
    """
    if count < 1000:
        return f"{count} bytes"
    shown = float(count)
    for unit in ("kB", "MB", "GB"):
        shown /= 1000
        if shown < 1000:
            return f"{shown:.1f} {unit}"
    return f"{shown / 1000:.1f} TB"
