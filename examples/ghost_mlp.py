"""Ten training steps of an MLP on synthetic data, and what each training sample does to the validation loss.

Per step and parameter it prints <grad l_i, mean_j grad l_j> for each training sample i, with the mean over validation
samples j. Positive: a plain gradient step on sample i lowers the validation loss. The last sample's label is wrong.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostfunc import classification_loss
from ghostfunc.engine import GradDotProdEngine

CLASSES, FEATURES = 3, 16


def draw(centres: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Draw n points around the centres of their classes: `[n, FEATURES]` and `[n]`."""
    labels = torch.randint(CLASSES, (n,))
    return centres[labels] + torch.randn(n, FEATURES), labels


def main() -> None:
    """Train, print and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--val_batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_printoptions(precision=4, sci_mode=False, linewidth=120)
    centres = torch.randn(CLASSES, FEATURES)
    X_val, Y_val = draw(centres, args.val_batch_size)

    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = GradDotProdEngine(model, (X_val, Y_val), loss=classification_loss, out="param train")

    for step in range(args.num_steps):
        X_train, Y_train = draw(centres, args.batch_size)
        Y_train[-1] = (Y_train[-1] + 1) % CLASSES

        output = engine(X_train, Y_train)  # where a plain loop has model(...)
        output.loss.backward()  # .grad holds the mean training gradient: any optimizer goes on from here
        optimizer.step()
        optimizer.zero_grad()

        print(f"step {step}: training loss {output.loss.item():.4f}")
        for name, dots in output.dots.items():
            print(f"  {name:<10} {dots}")
        print(f"  {'sum':<10} {torch.stack(list(output.dots.values())).sum(0)}")

    with torch.no_grad():
        print(f"final validation loss: {F.cross_entropy(model(X_val), Y_val):.4f}")


if __name__ == "__main__":
    main()
