"""A tensor that a smaller one was repeated to: where the repetition makes no difference, the smaller one is used."""

from __future__ import annotations

from ghostfunc._interpreter import Tracked
from ghostfunc._operations import op_name

_REPEATS = frozenset("expand expand_as broadcast_to repeat tile".split())


def unexpanded(tracked: Tracked) -> Tracked:
    """The tracked tensor that one was broadcast from; itself where it was not."""
    how = tracked.derivation
    if how is None or op_name(how.func) not in _REPEATS or not how.args or not isinstance(how.args[0], Tracked):
        return tracked
    base = how.args[0].real.shape
    behind = tracked.real.shape[tracked.real.dim() - len(base) :]
    broadcasts = all(small in (1, whole) for small, whole in zip(base, behind, strict=True))
    return unexpanded(how.args[0]) if broadcasts else tracked
