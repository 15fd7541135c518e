"""Text to GPT-2's token ids and back, over the ranks that are bundled: never the network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from importlib.resources import files

import tiktoken

_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# How GPT-2 cuts text before merging: contractions, words and numbers with the space before them,
# the rest, and runs of white space. Possessive quantifiers (++) only make it faster.
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """GPT-2's byte-pair encoding: any text has ids, and the ids give the text back.

    Raises:
        RuntimeError: the bundled ranks are not the published ones.

    Source: Radford et al. 2019, section 2.2; ranks and pattern as in tiktoken's `gpt2`.
    """

    def __init__(self) -> None:
        data = (files("gpt2") / "assets" / "gpt2.tiktoken").read_bytes()
        if (found := hashlib.sha256(data).hexdigest()) != _SHA256:
            raise RuntimeError(
                f"gpt2/assets/gpt2.tiktoken is damaged: its sha256 is {found}, not {_SHA256}. "
                "Install the package again."
            )
        pairs = (line.split() for line in data.splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        self.eos = len(ranks)
        """The id that ends a text, 50256; no text encodes to it."""
        self.vocab_size = len(ranks) + 1
        """The number of ids, 50257."""
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={_END_OF_TEXT: self.eos},
        )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; `<|endoftext|>` in it is text like any other."""
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: naming the ids that are out of range.
        """
        ids = list(ids)
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"Token ids must be in 0..{self.vocab_size - 1}, got {bad}.")
        return self._encoding.decode(ids, errors="replace")
