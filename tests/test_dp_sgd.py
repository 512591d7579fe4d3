"""DP-SGD on digits: what a step adds up to, and a small run."""

import re
import sys

import pytest
import torch
from cases import BY_NAME
from oracle import assert_grads, losses_and_grads
from test_clipping import between, norms_of, one_by_one

pytest.importorskip("opacus", reason="Opacus needs torch 2.6, and here an older one is tested")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
from opacus.accountants import RDPAccountant

import dp_sgd
from dp_sgd import Privacy, poisson_batch, private_gradient


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["dp_sgd.py", *arguments])
    dp_sgd.main()
    return capsys.readouterr().out


def test_a_small_run_learns_and_repeats(monkeypatch, capsys):
    options = "--steps 30 --batch_size 64 --width 16 --noise_multiplier 1 --max_norm 0.5 --delta 1e-5".split()
    printed = run(monkeypatch, capsys, *options)
    plain, private = (float(text) for text in re.findall(r"accuracy (\d+\.\d)%", printed))
    assert plain > 60
    assert private > 60
    accountant = RDPAccountant()
    for _ in range(30):
        accountant.step(noise_multiplier=1.0, sample_rate=64 / 1437)
    assert float(re.search(r"epsilon (\d+\.\d\d) \(rdp\)", printed)[1]) == pytest.approx(
        accountant.get_epsilon(delta=1e-5), abs=0.005
    )
    assert run(monkeypatch, capsys, *options) == printed


def test_a_run_with_empty_batches(monkeypatch, capsys):
    sizes = []
    batch = dp_sgd.poisson_batch
    monkeypatch.setattr(dp_sgd, "poisson_batch", lambda *a: [b := batch(*a), sizes.append(len(b[0]))][0])
    assert "epsilon" in run(monkeypatch, capsys, "--steps", "8", "--batch_size", "0.7", "--width", "4")
    assert sizes[:8] == sizes[8:], "both runs see the same batches"
    assert 0 in sizes
    assert max(sizes) > 0


@pytest.mark.parametrize("multiplier", [1e-14, 0.7])
def test_the_gradient_of_a_step(multiplier):
    """Clipped, then noise of this deviation, then divided by the size that is expected, whatever the batch's is."""
    model_fn, params, batch = BY_NAME["mlp"].make(torch.float64, torch.device("cpu"))
    data = batch(5, 1)
    _, g = losses_and_grads(model_fn, params, data)
    limit = between(norms_of(g))
    clipped, _ = one_by_one(g, {"": (list(g), limit)})
    privacy = Privacy(limit, multiplier, batch_size=8)
    found = private_gradient(model_fn, params, data, privacy, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    noise = {name: torch.randn(p.shape, generator=generator) for name, p in params.items()}
    expected = {name: (c + multiplier * limit * noise[name]) / 8 for name, c in clipped.items()}
    assert_grads(found, expected, 1e-10, "noisy")
    if multiplier < 1e-10:
        assert_grads(found, {name: c / 8 for name, c in clipped.items()}, 1e-10, "without noise")


def test_an_empty_batch_is_noise_alone():
    params = {"w": torch.ones(300, 200), "b": torch.ones(300)}
    empty = torch.ones(0, 200), torch.ones(0, dtype=torch.long)

    def model_fn(p, batch):
        raise AssertionError("nothing to run")

    found = private_gradient(model_fn, params, empty, Privacy(0.5, 3.0, 4), torch.Generator().manual_seed(0))
    assert {name: g.shape for name, g in found.items()} == {name: p.shape for name, p in params.items()}
    assert found["w"].std().item() == pytest.approx(3.0 * 0.5 / 4, rel=0.01)  # 3.5 deviations of this estimate
    assert abs(found["w"].mean().item()) < 4 * 0.375 / 60000**0.5
    assert not torch.equal(found["w"][0], found["w"][1])


def test_poisson_batches():
    n, rate, draws = 200, 0.1, 2000
    data = torch.arange(n), torch.arange(n)
    generator = torch.Generator().manual_seed(0)
    counts, sizes = torch.zeros(n), []
    for _ in range(draws):
        x, y = poisson_batch(data, rate, generator)
        assert torch.equal(x, y)
        assert len(x.unique()) == len(x)
        counts[x] += 1
        sizes.append(float(len(x)))
    deviation = (draws * rate * (1 - rate)) ** 0.5
    assert ((counts - draws * rate).abs() < 5 * deviation).all()
    spread = torch.tensor(sizes)
    assert spread.mean().item() == pytest.approx(n * rate, rel=0.02)
    assert spread.var().item() == pytest.approx(n * rate * (1 - rate), rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--delta", "0.01"], "must be below 1 / 1437"),
        (["--batch_size", "2000"], "there are 1437 training samples"),
        (["--noise_multiplier", "0"], "0 is not a number above 0"),
        (["--max_norm", "inf"], "inf is not a number above 0"),
    ],
)
def test_options_that_would_not_be_private(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("module", "words"), [("opacus.accountants", "Opacus"), ("sklearn.datasets", "scikit-learn")])
def test_a_missing_package_is_named(monkeypatch, capsys, module, words):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=words) as stop:
        run(monkeypatch, capsys, "--steps", "1")
    assert '".[privacy]"' in str(stop.value)
