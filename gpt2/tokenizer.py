"""Text to GPT-2's token ids and back, with bundled merges: never the network."""

import json
import operator
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from gpt2.files import written

_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# How GPT-2 cuts text before merging: contractions, words and numbers with the space before them,
# the rest, and runs of white space. Possessive quantifiers (++) only make it faster.
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_END_OF_TEXT = "<|endoftext|>"
Ids = np.ndarray[Any, np.dtype[Any]]


class Tokenizer:
    """GPT-2's byte-pair encoding: any text has ids, and the ids give the text back.

    Source: Radford et al. 2019, section 2.2; merges and pattern as in tiktoken's `gpt2`.
    """

    def __init__(self) -> None:
        glyphs = _glyphs()
        text = (files("gpt2") / "assets" / "merges.txt").read_text("utf-8")
        merges = [merge.replace(" ", "") for merge in text.splitlines()[1:]]
        self._merges, self._shown = text, [*glyphs.values(), *merges]  # by rank
        byte_of = {ord(glyph): byte for byte, glyph in glyphs.items()}
        tokens = (token.translate(byte_of).encode("latin-1") for token in self._shown)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self.fingerprint = f"gpt2, sha256 of its ranks {_SHA256}"
        self.eos = len(ranks)  # the id that ends a text, 50256; no text encodes to it
        self.vocab_size = len(ranks) + 1
        special: Any = {"mergeable_ranks": ranks, "special_tokens": {_END_OF_TEXT: self.eos}}
        self._encoding = tiktoken.Encoding("gpt2", pat_str=_PATTERN, **special)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; `<|endoftext|>` in it is text like any other."""
        return self._encoding.encode_ordinary(text)

    def encode_many(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        """All ids of many texts end to end, `eos` after each text; and where each `eos` stands.

        Several times as fast as `encode`, and Python's other threads run meanwhile.
        """
        joined = "".join(text + _END_OF_TEXT for text in texts)
        if joined.count(_END_OF_TEXT) == len(texts):
            ids = self._encoding.encode_to_numpy(joined, allowed_special={_END_OF_TEXT})
            return ids.astype(np.int32), np.flatnonzero(ids == self.eos)
        rows = [[*self.encode(text), self.eos] for text in texts]
        lengths = np.array([len(row) for row in rows], np.int64)
        return np.concatenate([[], *rows]).astype(np.int32), np.cumsum(lengths) - 1

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode([operator.index(i) for i in ids], errors="replace")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files from which transformers makes the same tokenizer.

        It takes `<|endoftext|>` in a text for the id that ends a text.
        """
        vocabulary = {token: rank for rank, token in enumerate([*self._shown, _END_OF_TEXT])}
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT)
        config = {"add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer", **special}
        contents = {
            "vocab.json": json.dumps(vocabulary, ensure_ascii=False) + "\n",
            "merges.txt": self._merges,
            "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
        }
        with written(folder) as beside:
            for name, text in contents.items():
                (beside / name).write_text(text, encoding="utf-8", newline="\n")


def _glyphs() -> dict[int, str]:
    """A character for each byte, by rank, as the published `bytes_to_unicode` has them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip([*printable, *others], map(chr, [*printable, *range(256, 324)]), strict=True))
