"""How far a call has come: counted in samples and tokens, and told to whoever asked."""

from collections.abc import Callable, Sequence

from ghostfunc.index._shards import Shard

Progress = Callable[[int, int, int], object]


class Counter:
    """Counts samples and tokens, and tells a progress callback: at once, and at each `add`.

    Args:
        total: samples in all.
        progress: `progress(samples done, samples in all, tokens of this call)`; None is told nothing.
        done: samples that were done before this call.
    """

    def __init__(self, total: int, progress: Progress | None, *, done: int = 0) -> None:
        self._total, self._done, self._tokens = total, done, 0
        self._progress = progress
        self.add(0, 0)

    @classmethod
    def of_shards(cls, share: Sequence[Shard], missing: Sequence[Shard], progress: Progress | None) -> "Counter":
        """A counter of the rows of a process's share of shards, of which some are yet to be written."""
        total, left = (sum(shard.stop - shard.start for shard in shards) for shards in (share, missing))
        return cls(total, progress, done=total - left)

    def add(self, samples: int, tokens: int) -> None:
        """Count what was done since the last time."""
        self._done += samples
        self._tokens += tokens
        if self._progress is not None:
            self._progress(self._done, self._total, self._tokens)
