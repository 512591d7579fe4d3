"""The errors that ghostfunc raises, each a plain Python error with a reason, the shapes and a remedy in its text."""

from collections.abc import Sequence


class UnsupportedUse(RuntimeError):
    """A parameter influences the losses through a use whose per-sample gradient is not accounted for.

    Attributes:
        parameters: names of the parameters concerned.
    """

    def __init__(self, message: str, parameters: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.parameters = tuple(parameters)


class InteractingSamples(ValueError):
    """The loss of one sample depends on another sample of the batch, so that it has no gradient of its own."""


class VerificationError(AssertionError):
    """`verify` found a quantity that differs from the oracle's."""


def interaction(reason: str) -> str:
    """The message of `InteractingSamples`: a reason, what it means, and the remedy."""
    return (
        f"{reason}, so that the loss of a sample depends on the others of its batch and has no gradient of its own. "
        "Put BatchNorm in eval mode, use a loss without in-batch terms (reduction='none'), or compute them outside."
    )
