"""What every corpus is: samples of tokens in a fixed order, and what is known about them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100


class Corpus(ABC):
    """N samples of at most `block_size` tokens, in the data's order.

    Attributes:
        name: what its rows in an index are called after.
        fingerprint: a sha256 over the content and everything that decides the samples.
        block_size: the most tokens that a sample has.
        lengths: int64 `[N]`, each sample's tokens.
    """

    name: str
    fingerprint: str
    block_size: int
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def tokens(self, i: int) -> np.ndarray:
        """The token ids of sample i, int64 `[lengths[i]]`."""

    @abstractmethod
    def text(self, i: int) -> str:
        """The text of sample i."""

    @abstractmethod
    def token_texts(self, i: int) -> list[str]:
        """The text of each token of sample i; one after the other they are `text(i)`.

        A character that several tokens share is the first one's; the others have "".
        """

    @abstractmethod
    def samples(self, start: int, stop: int) -> Any:
        """What is known about the samples from `start` to before `stop`.

        Returns:
            A `pyarrow.Table` of `sample_id` (int64, from 0 in this corpus), `document` and `domain` (string), `start`
            and `stop` (int64: the sample's characters in its document; of token files, its tokens in its file) and
            `tokens` (int32).
        """

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Samples as a batch for a causal language model.

        Args:
            indices: B samples, in any order.

        Returns:
            `input_ids` and `labels`, int64 `[B, T]`, T the longest's length. Shorter ones are padded on the right, with
            labels of -100 there, and `attention_mask [B, T]` is 0; where nothing is padded there is no mask.
        """
        rows = [self.tokens(int(i)) for i in indices]
        if not rows:
            raise ValueError("a batch has one sample at least; `indices` is empty")
        longest = max(map(len, rows))
        ids = np.zeros((len(rows), longest), dtype=np.int64)  # [B, T]
        mask = np.zeros((len(rows), longest), dtype=np.int64)  # [B, T]
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        input_ids, attention_mask = torch.from_numpy(ids), torch.from_numpy(mask)
        batch = {"input_ids": input_ids, "labels": input_ids.masked_fill(attention_mask == 0, IGNORED)}
        return batch if mask.all() else batch | {"attention_mask": attention_mask}

    @abstractmethod
    def largest_id(self) -> tuple[int, int]:
        """The largest token id, and the first sample that has it."""

    def require_vocabulary(self, size: int, model: str = "the model") -> None:
        """Check that every id is one of a vocabulary.

        Raises:
            ValueError: if one is not; the message names its sample.
        """
        largest, sample = self.largest_id()
        if largest >= size:
            document = self.samples(sample, sample + 1)["document"][0].as_py()
            raise ValueError(
                f"{self.name}: sample {sample} ({document}) holds the id {largest}, outside the vocabulary of {size} "
                f"that {model} has: use the model's own tokenizer"
            )

    def _checked(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"no sample {i}: {self.name} has {len(self)}, from 0 on")
        return i
