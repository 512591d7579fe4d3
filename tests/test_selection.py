"""The greedy rule against its definition written out, and the example that trains with it."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import per_sample_grads
from torch.utils._python_dispatch import TorchDispatchMode

import ghostfunc as gf
import select_batches
from shared.domain_list import domain_file, split_folder

ROOT = Path(__file__).parents[1]
repeatable = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def gradients(n: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-sample gradients `[n, width]` and a validation gradient `[width]`."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return g, torch.randn(width, generator=generator, dtype=torch.float64)


def by_definition(g: torch.Tensor, v: torch.Tensor, k: int, lr: float) -> list[int]:
    """Each choice has the largest product with the validation gradient after the step on those before, H = identity."""
    chosen: list[int] = []
    for _ in range(k):
        after = v - lr / k * sum((g[j] for j in chosen), torch.zeros_like(v))
        gains = {z: float(g[z] @ after) for z in range(len(g)) if z not in chosen}
        chosen.append(max(gains, key=lambda z: (gains[z], -z)))
    return chosen


@repeatable
@given(
    n=st.integers(1, 12), width=st.integers(1, 6), seed=st.integers(0, 10**6), lr=st.floats(0, 5), data=st.data(),
)  # fmt: skip
def test_agrees_with_the_definition(n, width, seed, lr, data):
    k = data.draw(st.integers(1, n))
    g, v = gradients(n, width, seed)
    assert gf.greedy_select(g @ v, g @ g.T, k, lr=lr).tolist() == by_definition(g, v, k, lr)


def test_each_choice_is_the_best_step_that_a_quadratic_loss_allows():
    """L(x) = |x - target|²/2 has H = 1: the choice has the largest product with L's gradient after the step before."""
    g, target = gradients(9, 5, 3)
    x = torch.zeros_like(target, requires_grad=True)
    k, lr = 4, 0.8
    chosen = gf.greedy_select(g @ -target, g @ g.T, k, lr=lr).tolist()
    for count, z in enumerate(chosen):
        here = x.detach() - lr / k * g[chosen[:count]].sum(0)
        here.requires_grad_()
        (gradient,) = torch.autograd.grad(0.5 * (here - target).square().sum(), here)
        gains = g @ gradient
        gains[chosen[:count]] = -math.inf
        assert int(gains.argmax()) == z
    assert chosen != (g @ -target).topk(k).indices.tolist()  # so that the redundancy mattered


def test_without_redundancy_it_is_the_top_k():
    dots = torch.tensor([0.5, -1.0, 3.0, 2.0, -4.0])
    want = [2, 3, 0, 1]
    assert gf.greedy_select(dots, torch.zeros(5, 5), 4, lr=10.0).tolist() == want
    g = torch.randn(5, 3)
    assert gf.greedy_select(dots, g @ g.T, 4, lr=0.0).tolist() == want


def test_a_duplicate_gives_way_to_another_useful_sample():
    g = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    v = torch.tensor([1.0, 1.0])
    assert gf.greedy_select(g @ v, g @ g.T, 2, lr=1.0).tolist() == [0, 3]
    assert (g @ v).topk(2).indices.tolist() != [0, 3]


def test_the_unit_of_the_redundancy_is_the_step_on_the_mean():
    """Two samples, the second nearly the first again: it loses once lr/k * gram outweighs its lead over the third."""
    dots, gram = torch.tensor([3.0, 2.9, 2.0]), torch.tensor([[4.0, 3.6, 0.0], [3.6, 4.0, 0.0], [0.0, 0.0, 1.0]])
    at = 2 * 0.9 / 3.6  # dots[1] - lr/2 * gram[0, 1] = dots[2]
    assert gf.greedy_select(dots, gram, 2, lr=0.99 * at).tolist() == [0, 1]
    assert gf.greedy_select(dots, gram, 2, lr=1.01 * at).tolist() == [0, 2]


def test_of_equals_the_lowest_index_comes_first():
    assert gf.greedy_select(torch.zeros(6), torch.zeros(6, 6), 4, lr=1.0).tolist() == [0, 1, 2, 3]
    assert gf.greedy_select(torch.tensor([1.0, 2.0, 2.0, 2.0]), torch.eye(4), 3, lr=1.0).tolist() == [1, 2, 3]


def test_harmful_samples_are_chosen_last_but_k_are_chosen():
    dots = torch.tensor([-3.0, 1.0, -1.0])
    assert gf.greedy_select(dots, torch.eye(3), 3, lr=1.0).tolist() == [1, 2, 0]


@repeatable
@given(n=st.integers(2, 12), seed=st.integers(0, 10**6), lr=st.floats(0, 5), data=st.data())
def test_a_permutation_of_the_candidates_permutes_the_choice(n, seed, lr, data):
    k = data.draw(st.integers(1, n))
    order = torch.tensor(data.draw(st.permutations(range(n))))
    g, v = gradients(n, 4, seed)
    chosen = gf.greedy_select(g @ v, g @ g.T, k, lr=lr)
    moved = g[order]
    assert order[gf.greedy_select(moved @ v, moved @ moved.T, k, lr=lr)].tolist() == chosen.tolist()


@repeatable
@given(n=st.integers(1, 8), seed=st.integers(0, 10**6), scale=st.floats(-8, 8))
def test_the_unit_of_the_loss_does_not_matter(n, seed, scale):
    """A loss in other units: gradients times c, and the learning rate that makes the same steps, lr / c."""
    g, v = gradients(n, 4, seed)
    c = 2.0 ** round(scale)
    want = gf.greedy_select(g @ v, g @ g.T, n, lr=0.5).tolist()
    assert gf.greedy_select(c * c * (g @ v), c * c * (g @ g.T), n, lr=0.5).tolist() == want


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_inputs_and_results(dtype, device):
    g, v = gradients(7, 3, 1)
    dots, gram = (x.to(device, dtype).requires_grad_() for x in (g @ v, g @ g.T))
    before = dots.clone(), gram.clone()
    chosen = gf.greedy_select(dots, gram, 3, lr=0.5)
    assert chosen.dtype == torch.int64 and chosen.device == dots.device and chosen.shape == (3,)
    assert torch.equal(dots, before[0]) and torch.equal(gram, before[1])
    exact = gf.greedy_select(dots.double(), gram.double(), 3, lr=0.5)  # sums of rounded numbers, not rounded sums
    assert torch.equal(chosen, exact)


def test_no_choice_waits_for_the_host():
    """What would make a GPU's queue drain, a value that the host reads or a shape that depends on one, is not used."""
    waits = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique_dim", "_unique2", "equal"}
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    g, v = gradients(9, 4, 0)
    with Watch():
        gf.greedy_select(g @ v, g @ g.T, 6, lr=0.5)
    assert seen.count("argmax") == 6
    assert not waits & set(seen)


def test_with_a_model_s_dots_and_gram(device):
    """Dots and Gram as the transforms give them choose what per-sample gradients choose."""
    model_fn, params = gf.functionalize(torch.nn.Linear(4, 3).double().to(device), gf.classification_loss)
    x, y = torch.randn(13, 4, dtype=torch.float64).to(device), torch.randint(3, (13,)).to(device)
    candidates, val = (x[:10], y[:10]), (x[10:], y[10:])
    dots = gf.ghost_grad_dot(model_fn, params, candidates, val)
    gram = gf.ghost_grad_gram(model_fn, params, candidates)
    g, v = (
        torch.cat([grad.flatten(1) for grad in gf.per_sample_grad(model_fn, params, batch).values()], 1).cpu()
        for batch in (candidates, val)
    )
    for lr in (0.1, 3.0):
        assert gf.greedy_select(dots, gram, 4, lr=lr).tolist() == by_definition(g, v.mean(0), 4, lr)


OK = torch.eye(3)


@pytest.mark.parametrize(
    ("dots", "gram", "k", "lr", "error", "message"),
    [
        (torch.ones(3), torch.ones(3, 4), 1, 1.0, ValueError, r"dots has shape \(3,\) and gram \(3, 4\)"),
        (torch.ones(3, 1), OK, 1, 1.0, ValueError, r"dots has shape \(3, 1\)"),
        (torch.tensor(1.0), torch.tensor([[1.0]]), 1, 1.0, ValueError, r"dots has shape \(\)"),
        (torch.ones(0), torch.ones(0, 0), 1, 1.0, ValueError, "k=1: .* number of candidates, 0"),
        (torch.ones(3), OK, 0, 1.0, ValueError, "k=0: .* from 1 to the number of candidates, 3"),
        (torch.ones(3), OK, 4, 1.0, ValueError, "k=4: .* from 1 to the number of candidates, 3"),
        (torch.ones(3), OK, 1, -0.1, ValueError, "lr=-0.1: "),
        (torch.ones(3), OK, 1, math.nan, ValueError, "lr=nan: "),
        (torch.ones(3), OK, 1, math.inf, ValueError, "lr=inf: "),
        (torch.tensor([1.0, math.nan, 0.0]), OK, 1, 1.0, ValueError, "must be finite"),
        (torch.tensor([1.0, -math.inf, 0.0]), OK, 1, 1.0, ValueError, "must be finite"),
        (torch.ones(3), OK * math.inf, 1, 1.0, ValueError, "must be finite"),
        (torch.ones(3), OK + math.nan, 1, 0.0, ValueError, "must be finite"),
        (torch.ones(3), 3e38 * torch.ones(3, 3), 1, 1e6, ValueError, "must be finite"),
        (torch.ones(3), torch.arange(9.0).view(3, 3), 1, 1.0, ValueError, "not symmetric: .* differ by up to 4"),
        (torch.ones(3, dtype=torch.int64), OK, 1, 1.0, TypeError, "dots has dtype torch.int64"),
        (torch.ones(3), OK.long(), 1, 1.0, TypeError, "gram has dtype torch.int64"),
        (torch.ones(3), OK.to("meta"), 1, 1.0, ValueError, "dots is on cpu, gram on meta"),
    ],
)
def test_errors_say_what_is_wrong(dots, gram, k, lr, error, message):
    with pytest.raises(error, match=message):
        gf.greedy_select(dots, gram, k, lr=lr)


def test_a_gram_that_is_symmetric_up_to_rounding_is_taken():
    g, v = gradients(8, 4, 2)
    gram = g @ g.T
    noise = 1e-6 * torch.randn(8, 8, dtype=torch.float64)
    want = gf.greedy_select(g @ v, gram, 5, lr=0.5)
    assert torch.equal(gf.greedy_select(g @ v, gram + noise, 5, lr=0.5), want)
    with pytest.raises(ValueError, match="not symmetric"):
        gf.greedy_select(g @ v, gram + 1e5 * noise, 5, lr=0.5)


# --- the example ------------------------------------------------------------------------------------------------------

TINY = shlex.split(
    "--steps 4 --evaluate_every 2 --candidates 6 --batch_size 2 --val_batch_size 2 --block_size 6 --vocabulary 24 "
    "--warmup_steps 1 --val_domain code"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two domains of regular but different texts, with some ids that are rare in training."""
    folder = tmp_path_factory.mktemp("data")
    for split, tokens in (("train", 600), ("validation", 90), ("test", 60)):
        place = split_folder(folder, split)
        place.mkdir(exist_ok=True)
        for domain, stride in (("code", 3), ("prose", 7)):
            ids = np.arange(tokens) * stride % 22
            ids[::50] = 1000 + np.arange(len(ids[::50])) % 5
            ids.astype("<u2").tofile(domain_file(folder, split, domain))
    return folder


@pytest.fixture(scope="module")
def small_run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    options = [*TINY, "--seeds", "1", "--data_dir", str(data), "--json", str(out / "s.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_batches, "ROUNDS", 1)
        return select_batches.main([*options, "--figure", str(out / "s.png")]), out


def test_the_example_compares_all_methods_and_writes_what_it_found(small_run):
    results, out = small_run
    assert json.loads((out / "s.json").read_text()) == results
    assert (out / "s.png").read_bytes().startswith(b"\x89PNG")
    assert [(run["seed"], run["method"]) for run in results["runs"]] == [
        (1, method) for method in select_batches.METHODS
    ]
    costs = {method: cost["relative_flops"] for method, cost in results["costs"].items()}
    assert costs["random"] == 1 < costs["top-k"] < costs["greedy"] == costs["greedy-length"]
    for run in results["runs"]:
        last = 4 if run["method"] != "random" else 2 * math.ceil(4 * costs["greedy"] / 2)
        assert run["steps"] == list(range(2, last + 1, 2)) and len(run["losses"]) == len(run["share"]) == last // 2
        assert all(0 < loss < math.log(30) for loss in run["losses"]) and run["losses"][-1] < run["losses"][0]
    lines = select_batches.table(results).splitlines()
    assert len(lines) == 6 and lines[2].startswith("random") and "1.00x" in lines[2]


def test_the_methods_share_the_start_and_the_candidates_of_a_seed(data):
    options = select_batches.build_parser().parse_args(TINY)
    texts = select_batches.Texts(data, "code", block_size=6, vocabulary=24)
    one, other, elsewhere = (
        select_batches.Training(method, options, texts, seed)
        for method, seed in (("random", 0), ("greedy", 0), ("greedy", 1))
    )
    assert one.held_out_loss() == other.held_out_loss() != elsewhere.held_out_loss()
    pools = []
    for training in (one, other):
        choose = training._choose
        training._choose = lambda pool, rate, choose=choose: pools.append(pool["input_ids"]) or choose(pool, rate)
        training.step()
    assert torch.equal(pools[0], pools[1])


def test_what_greedy_and_top_k_choose_is_what_the_gradients_say(data):
    options = select_batches.build_parser().parse_args(TINY)
    texts = select_batches.Texts(data, "code", block_size=6, vocabulary=24)
    training = select_batches.Training("greedy", options, texts, 0)
    training.model.double()
    training.params = {name: p.detach() for name, p in training.model.named_parameters()}
    pool, _ = texts.draw(texts.train, 6, 0, 0)
    val, _ = texts.draw(texts.val, 2, 0, 0)
    g, v = (
        torch.cat([grad.flatten(1) for grad in per_sample_grads(training.model_fn, training.params, batch).values()], 1)
        for batch in (pool, val)
    )
    for method, rate in (("greedy", 0.1), ("greedy", 3.0), ("top-k", 0.1)):
        training.method = method
        want = by_definition(g, v.mean(0), 2, rate if method == "greedy" else 0.0)
        assert training._choose(pool, rate).tolist() == want


def test_rare_tokens_are_read_but_are_no_labels(data):
    texts = select_batches.Texts(data, "code", block_size=6, vocabulary=24)
    batch, domains = texts.draw(texts.train, 100, 0, 0)
    assert set(domains) == {"code", "prose"}
    rare = batch["input_ids"] == 23
    assert rare.any() and (batch["labels"][rare] == -100).all()
    assert torch.equal(batch["labels"][~rare], batch["input_ids"][~rare])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "5"], "--steps must be a multiple of --evaluate_every"),
        (["--batch_size", "7"], "--batch_size must be from 1 to --candidates"),
        (["--val_domain", "poetry"], "no validation file for poetry"),
    ],
)
def test_the_example_says_which_option_is_wrong(data, options, message, capsys):
    with pytest.raises(SystemExit):
        select_batches.main([*TINY, "--data_dir", str(data), *options])
    assert message in capsys.readouterr().err


def test_the_committed_result_is_of_three_seeds_and_of_the_script_as_it_is():
    results = json.loads((ROOT / "benchmarks" / "results" / "selection.json").read_text())
    defaults = vars(select_batches.build_parser().parse_args([]))
    assert results["setting"] == {name: defaults[name] for name in results["setting"]}
    assert {run["seed"] for run in results["runs"]} == {0, 1, 2} and len(results["runs"]) == 12
    printed = (ROOT / "examples" / "README.md").read_text()
    assert select_batches.table(results) in printed
