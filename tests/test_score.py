"""Queries and scores of a small GPT-2 in float64, against the oracle's gradients; runs that are killed and resumed."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from oracle import losses_and_grads
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import ghostfunc as gf
from ghostfunc.index import Store, StoreError, StoreWriter, project_queries, score_corpus, search
from ghostfunc.text import Corpus

VOCABULARY, WIDTH = 31, 8
Grads = dict[str, Tensor]


class Ids(Corpus):
    """Random ids, of samples of different lengths."""

    def __init__(self, lengths: list[int], seed: int, name: str = "ids") -> None:
        generator = np.random.default_rng(seed)
        self.rows = [generator.integers(VOCABULARY, size=length) for length in lengths]
        self.name, self.block_size, self.lengths = name, 16, np.array(lengths, dtype=np.int64)
        self.fingerprint = hashlib.sha256(b"".join(row.tobytes() for row in self.rows)).hexdigest()

    def tokens(self, i: int) -> np.ndarray:
        return self.rows[i]

    def text(self, i: int) -> str:
        return " ".join(map(str, self.rows[i]))

    def token_texts(self, i: int) -> list[str]:
        return list(map(str, self.rows[i]))

    def largest_id(self) -> tuple[int, int]:
        return VOCABULARY - 1, 0

    def samples(self, start: int, stop: int) -> Any:
        ids = range(start, stop)
        return pyarrow.table({"sample_id": ids, "document": [f"document {i}" for i in ids], "domain": ["x"] * len(ids)})


@pytest.fixture(scope="module")
def model() -> tuple[Any, Grads]:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=WIDTH, vocab_size=VOCABULARY, n_positions=16, bos_token_id=0, eos_token_id=0,
        use_cache=False,
    )  # fmt: skip
    return gf.functionalize(GPT2LMHeadModel(config).double().eval(), gf.causal_lm_loss)


CORPUS = Ids([5, 16, 9, 2, 12, 9, 7, 3, 16, 10, 4], seed=1)
QUERIES = Ids([8, 3, 14, 8], seed=2, name="queries")


def oracle(model: tuple[Any, Grads], corpus: Corpus) -> tuple[Tensor, Grads]:
    """Losses and gradients of every sample by itself, without padding."""
    pairs = [losses_and_grads(*model, corpus.batch([i])) for i in range(len(corpus))]
    return torch.cat([loss for loss, _ in pairs]), {n: torch.cat([g[n] for _, g in pairs]) for n in model[1]}


def flat(grads: Grads, lead: int = 1) -> Tensor:
    return torch.cat([g.flatten(lead) for g in grads.values()], lead)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.1e}"


@pytest.fixture(scope="module")
def projection(model: tuple[Any, Grads]) -> gf.KroneckerProjection:
    return gf.kronecker_projection(*model, CORPUS.batch([0, 1]), rank=16, min_rank=2, include=("norm", "embedding"))


@pytest.fixture(scope="module")
def ekfac(model: tuple[Any, Grads]) -> gf.FisherPreconditioner:
    return gf.ekfac(*model, [CORPUS.batch([1, 4]), CORPUS.batch([2, 5])])


# ---------------------------------------------------------------- queries


@pytest.mark.parametrize("budget", [1, 20, 4096])
def test_queries_are_projections_of_their_own_gradients(model, projection, budget: int) -> None:
    losses, grads = oracle(model, QUERIES)
    told = []
    found = project_queries(*model, projection, QUERIES, token_budget=budget, progress=lambda *now: told.append(now))
    close(found.losses, losses)
    rows = torch.stack([projection.project({name: g[i] for name, g in grads.items()}) for i in range(len(QUERIES))])
    close(found.rows, rows)
    assert told[0] == (0, 4, 0) and told[-1] == (4, 4, 33)
    mean = project_queries(*model, projection, QUERIES, token_budget=budget, reduction="mean")
    close(mean.rows, rows.mean(0, True))
    close(mean.losses, losses.mean(0, True))


@pytest.mark.parametrize("reduction", ["each", "mean"])
def test_queries_are_preconditioned_before_they_are_projected(model, projection, ekfac, reduction: str) -> None:
    losses, grads = oracle(model, QUERIES)
    told = []
    found = project_queries(
        *model, projection, QUERIES, precondition=ekfac, token_budget=20, reduction=reduction,
        progress=lambda *now: told.append(now),
    )  # fmt: skip
    reduced = grads if reduction == "each" else {name: g.mean(0, True) for name, g in grads.items()}
    dense = [{name: g[i] for name, g in reduced.items()} for i in range(len(found.rows))]
    close(found.rows, torch.stack([projection.project(ekfac(g)) for g in dense]))
    assert (found.rows - torch.stack([projection.project(g) for g in dense])).norm() > 0.1 * found.rows.norm()
    close(found.losses, losses if reduction == "each" else losses.mean(0, True))
    assert told[0] == (0, 4, 0) and told[-1] == (4, 4, 33)


def test_a_preconditioner_of_other_layers_is_refused(model, projection) -> None:
    some = gf.ekfac(*model, [CORPUS.batch([1, 4])], layers="h.0")
    with pytest.raises(ValueError, match=r"has no transformer\.\S+, which the projection is of"):
        project_queries(*model, projection, QUERIES, precondition=some)


def test_queries_of_no_samples_or_reduction(model, projection) -> None:
    with pytest.raises(ValueError, match="the corpus nothing has no samples"):
        project_queries(*model, projection, Ids([], 0, "nothing"))
    with pytest.raises(ValueError, match="reduction='sum': expected 'each' or 'mean'"):
        project_queries(*model, projection, QUERIES, reduction="sum")


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("reduction", ["each", "mean"])
@pytest.mark.parametrize("layers", ["", "mlp, wte"])
def test_scores_are_exact_dots(model, tmp_path: Path, reduction: str, layers: str) -> None:
    losses, grads = oracle(model, CORPUS)
    _, of_queries = oracle(model, QUERIES)
    if layers:
        grads, of_queries = ({n: g for n, g in t.items() if "mlp" in n or "wte" in n} for t in (grads, of_queries))
    directions = flat(of_queries) if reduction == "each" else flat(of_queries).mean(0, True)
    store = score_corpus(
        tmp_path, CORPUS, *model, QUERIES, reduction=reduction, layers=layers, shard_rows=4, token_budget=40
    )
    expected = flat(grads) @ directions.t()
    scale = flat(grads).norm(dim=1)[:, None] * directions.norm(dim=1)
    rows = store.read(0, len(CORPUS))
    assert rows.shape == expected.shape and store.complete and store.dtype == "float32"
    assert ((rows - expected).abs() / scale).max() < 1e-7  # float32's rounding of a number below its scale
    assert list(store.slices) == (["mean"] if reduction == "mean" else ["query 0", "query 1", "query 2", "query 3"])
    samples = store.samples()
    torch.testing.assert_close(torch.tensor(samples["loss"].to_pylist()), losses.float())
    assert samples["document"].to_pylist()[3] == "document 3"
    hits = search(store, torch.eye(store.dim), 3)
    assert torch.equal(hits.rows, rows.t().sort(dim=1, descending=True, stable=True).indices[:, :3])


def test_in_float64_before_they_are_stored(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed is exact to rounding in float64; the store is what rounds to float32."""
    kept = {}
    along = gf.ghost_quantities

    def quantities(*args: Any, **how: Any) -> Any:
        result = along(*args, **how)
        kept[len(kept)] = torch.stack([result[f"query {i}"] for i in range(4)], 1)
        return result

    monkeypatch.setattr("ghostfunc.index._score.ghost_quantities", quantities)
    score_corpus(tmp_path, CORPUS, *model, QUERIES, token_budget=1)
    _, grads = oracle(model, CORPUS)
    _, of_queries = oracle(model, QUERIES)
    longest_first = np.argsort(-CORPUS.lengths, kind="stable")
    expected = (flat(grads) @ flat(of_queries).t())[torch.from_numpy(longest_first)]
    scale = flat(grads).norm(dim=1)[longest_first, None] * flat(of_queries).norm(dim=1)
    assert ((torch.cat(list(kept.values())) - expected).abs() / scale).max() < 1e-12


def test_scores_with_a_preconditioner(model, ekfac, tmp_path: Path) -> None:
    _, grads = oracle(model, CORPUS)
    _, of_queries = oracle(model, QUERIES)
    directions = torch.stack([flat(ekfac({n: g[i] for n, g in of_queries.items()}), 0) for i in range(4)])
    store = score_corpus(tmp_path, CORPUS, *model, QUERIES, precondition=ekfac)
    expected = flat(grads) @ directions.t()
    scale = flat(grads).norm(dim=1)[:, None] * directions.norm(dim=1)
    assert ((store.read(0, len(CORPUS)) - expected).abs() / scale).max() < 1e-6


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(model, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(done: int, total: int, tokens: int) -> None:
        if done >= 6:
            raise Killed

    whole, told = tmp_path / "whole", []
    score_corpus(whole, CORPUS, *model, QUERIES, shard_rows=4, progress=lambda *now: told.append(now))
    assert told[0] == (0, 11, 0) and told[-1] == (11, 11, 93)
    with pytest.raises(Killed):
        score_corpus(tmp_path / "part", CORPUS, *model, QUERIES, shard_rows=4, progress=kill)
    assert not Store(tmp_path / "part").complete and len(Store(tmp_path / "part").missing_shards) == 2
    told.clear()
    score_corpus(tmp_path / "part", CORPUS, *model, QUERIES, shard_rows=4, progress=lambda *now: told.append(now))
    assert told[0] == (4, 11, 0) and told[-1] == (11, 11, int(CORPUS.lengths[4:].sum()))
    assert contents(tmp_path / "part") == contents(whole)


def test_processes_share_the_work(model, tmp_path: Path) -> None:
    whole = score_corpus(tmp_path / "one", CORPUS, *model, QUERIES, shard_rows=4)
    for rank in (1, 0):
        store = score_corpus(tmp_path / "two", CORPUS, *model, QUERIES, shard_rows=4, rank=rank, world=2)
        assert store.complete == (rank == 0)
    assert contents(whole.folder) == contents(store.folder)
    more = Ids([3, 6], seed=9, name="more")
    store = score_corpus(tmp_path / "two", more, *model, QUERIES, shard_rows=4, append=True)
    assert store.rows == 13 and list(store.sources) == ["ids", "more"]


def test_scores_of_something_else_are_refused(model, ekfac, tmp_path: Path) -> None:
    score_corpus(tmp_path, CORPUS, *model, QUERIES, precondition=ekfac)
    before = contents(tmp_path)
    model_fn, params = model
    others: dict[str, dict[str, Any]] = {
        "model.fingerprint": {"params": {name: p + 1e-6 for name, p in params.items()}},
        "settings.queries": {"queries": Ids([8, 3, 14, 8], seed=3)},
        "settings.reduction": {"reduction": "mean", "queries": Ids([8], seed=2)},
        "settings.layers": {"layers": "h.0", "precondition": ekfac},
        "settings.precondition": {"precondition": None},
        "other data": {"corpus": Ids([4], seed=1, name="another")},
    }
    more = gf.ekfac(*model, [CORPUS.batch([1, 4]), CORPUS.batch([2, 6])])
    assert repr(more) == repr(ekfac)
    for field, change in [*others.items(), ("settings.precondition", {"precondition": more})]:
        given = {"corpus": CORPUS, "model_fn": model_fn, "params": params, "queries": QUERIES, "precondition": ekfac}
        with pytest.raises(StoreError) as caught:
            score_corpus(tmp_path, **(given | change))
        assert field in str(caught.value) or field == "other data", str(caught.value)
    assert contents(tmp_path) == before


def test_a_preconditioner_without_a_fingerprint(model, tmp_path: Path) -> None:
    class Halved:
        fingerprint = "half"

        def __call__(self, gradient: Grads) -> Grads:
            return {name: g / 2 for name, g in gradient.items()}

    plain = score_corpus(tmp_path / "plain", CORPUS, *model, QUERIES)
    half = score_corpus(tmp_path / "half", CORPUS, *model, QUERIES, precondition=Halved())
    torch.testing.assert_close(half.read(0, 11) * 2, plain.read(0, 11))
    with pytest.raises(TypeError, match="precondition= is a function without a `fingerprint`"):
        score_corpus(tmp_path / "none", CORPUS, *model, QUERIES, precondition=lambda gradient: gradient)
    some = gf.ekfac(*model, [CORPUS.batch([1, 4])], layers="h.0")
    with pytest.raises(ValueError, match=r"gave nothing for transformer\.wte\.weight"):
        score_corpus(tmp_path / "some", CORPUS, *model, QUERIES, precondition=some)
    score_corpus(tmp_path / "h.0", CORPUS, *model, QUERIES, precondition=some, layers="h.0")


def test_losses_that_are_not_finite(model, tmp_path: Path) -> None:
    model_fn, params = model

    def spoilt(p: Grads, batch: Any) -> Tensor:
        return model_fn(p, batch) / (batch["input_ids"].shape[1] != 2)

    with pytest.raises(ValueError, match=r"ids, in a batch of samples 0 to 4: .* losses of samples .0. are not finite"):
        score_corpus(tmp_path, CORPUS, spoilt, params, QUERIES, token_budget=1, shard_rows=4)
    assert Store(tmp_path).missing_shards


def test_the_writer_is_the_stores(model, tmp_path: Path) -> None:
    """A folder of something else is not taken for scores."""
    StoreWriter(tmp_path, dim=4, settings={})
    with pytest.raises(StoreError, match="holds another index"):
        score_corpus(tmp_path, CORPUS, *model, QUERIES)
