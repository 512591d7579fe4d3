"""Train a classifier of handwritten digits with differential privacy (DP-SGD), and the same without.

    python examples/dp_sgd.py                                  # under a minute on one core
    python examples/dp_sgd.py --noise_multiplier 3 --steps 600 --max_norm 0.5

Each step, every training sample is in the batch with probability q = batch_size / N on its own (a Poisson batch, of any
size, none included). The step goes along

    ( sum_b min(1, C / |grad l_b|) grad l_b  +  noise_multiplier * C * N(0, 1) ) / batch_size

(Abadi et al., 2016, arXiv 1607.00133, algorithm 1): `ghost_clipped_grad` gives the sum from one backward, without a
gradient of any single sample. Adding or removing one sample moves the sum by C at most, and the noise hides that; how
well is Opacus's accounting, printed as epsilon at delta. It covers the training alone: not a choice of options by
looking at results, and not the noise itself, which comes from a seeded generator that repeats and could be guessed.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

import ghostfunc as gf

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
ModelFn = Callable[..., Tensor]  # model_fn(params, batch) -> losses [B]
Gradient = Callable[[Params, Batch], Params]

TRAIN = 1437  # of 1797 images


class Privacy(NamedTuple):
    """What is added to a step for privacy.

    Attributes:
        max_norm: C, which each sample's gradient is clipped to.
        noise_multiplier: standard deviation of the noise, over C.
        batch_size: the expected one, which the sum is divided by.
    """

    max_norm: float
    noise_multiplier: float
    batch_size: float


def digits(seed: int) -> tuple[Batch, Batch]:
    """Scikit-learn's digits for training and for testing, `[n, 64]` with values from 0 to 1, shuffled."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise SystemExit(f'No {error.name}: the data comes with scikit-learn. pip install -e ".[privacy]"') from error
    data: Any = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    x, y = torch.as_tensor(data.data, dtype=torch.float32)[order] / 16, torch.as_tensor(data.target)[order]
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])


def poisson_batch(data: Batch, rate: float, generator: torch.Generator) -> Batch:
    """Each sample with this probability, on its own."""
    chosen = torch.rand(len(data[0]), generator=generator) < rate
    return data[0][chosen], data[1][chosen]


def private_gradient(
    model_fn: ModelFn, params: Params, batch: Batch, privacy: Privacy, generator: torch.Generator
) -> Params:
    """The noisy mean of clipped gradients; of an empty batch, the noise alone."""
    if len(batch[0]):
        sums, _ = gf.ghost_clipped_grad(model_fn, params, batch, privacy.max_norm)
    else:
        sums = {name: torch.zeros_like(p) for name, p in params.items()}
    deviation = privacy.noise_multiplier * privacy.max_norm
    return {
        name: (g + deviation * torch.randn(g.shape, generator=generator)) / privacy.batch_size
        for name, g in sums.items()
    }


def plain_gradient(model_fn: ModelFn, params: Params, batch: Batch) -> Params:
    """The gradient of the mean loss; zero for an empty batch."""
    if not len(batch[0]):
        return {name: torch.zeros_like(p) for name, p in params.items()}
    return torch.func.grad(lambda p: model_fn(p, batch).mean())(params)


def train(params: Params, gradient: Gradient, data: Batch, *, rate: float, lr: float, steps: int, seed: int) -> Params:
    """Plain gradient descent on Poisson batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        grads = gradient(params, poisson_batch(data, rate, generator))
        params = {name: p - lr * grads[name] for name, p in params.items()}
    return params


def accuracy(model: nn.Module, params: Params, data: Batch) -> float:
    """Share of samples that are classified right."""
    return (functional_call(model, params, (data[0],)).argmax(1) == data[1]).double().mean().item()


def privacy_accountant(name: str) -> Any:
    """Opacus's accountant: "rdp" (Renyi, fast) or "prv" (numerical, tighter)."""
    try:
        from opacus.accountants import create_accountant
    except ModuleNotFoundError as error:
        raise SystemExit(f'No {error.name}: Opacus accounts for privacy. pip install -e ".[privacy]"') from error
    return create_accountant(name)


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=positive, default=128, help="expected size of a Poisson batch")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=positive, default=1.0, help="of both runs")
    parser.add_argument("--max_norm", type=positive, default=0.5, help="C")
    parser.add_argument("--noise_multiplier", type=positive, default=2.0)
    parser.add_argument("--delta", type=positive, default=1e-4, help="below 1 / the number of training samples")
    parser.add_argument("--accountant", choices=["rdp", "prv"], default="rdp")
    parser.add_argument("--width", type=int, default=128, help="of the hidden layer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.batch_size > TRAIN:
        parser.error(f"--batch_size {args.batch_size:g}: there are {TRAIN} training samples")
    if args.delta >= 1 / TRAIN:
        parser.error(f"--delta {args.delta:g} must be below 1 / {TRAIN}: otherwise publishing a sample would pass")
    return args


def main() -> None:
    """Train twice, and print accuracies and epsilon."""
    args = arguments()
    accountant = privacy_accountant(args.accountant)
    data, test = digits(args.seed)
    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(64, args.width), nn.Tanh(), nn.Linear(args.width, 10))
    model_fn, start = gf.functionalize(model, gf.classification_loss)
    privacy = Privacy(args.max_norm, args.noise_multiplier, args.batch_size)
    rate = args.batch_size / TRAIN
    run = {"rate": rate, "lr": args.learning_rate, "steps": args.steps, "seed": args.seed}
    print(
        f"{TRAIN} training samples, {len(test[0])} for testing; {args.steps} steps of {args.batch_size:g} samples on "
        f"average\nClipped to {args.max_norm:g}, noise multiplier {args.noise_multiplier:g}, delta {args.delta:g}"
    )
    plain = train(start, lambda p, batch: plain_gradient(model_fn, p, batch), data, **run)
    print(f"not private: accuracy {accuracy(model, plain, test):.1%}", flush=True)

    noise = torch.Generator().manual_seed(args.seed + 1)

    def gradient(params: Params, batch: Batch) -> Params:
        accountant.step(noise_multiplier=args.noise_multiplier, sample_rate=rate)
        return private_gradient(model_fn, params, batch, privacy, noise)

    private = train(start, gradient, data, **run)
    epsilon = accountant.get_epsilon(delta=args.delta) if args.steps else 0.0
    print(f"private:     accuracy {accuracy(model, private, test):.1%}, epsilon {epsilon:.2f} ({args.accountant})")


if __name__ == "__main__":
    main()
