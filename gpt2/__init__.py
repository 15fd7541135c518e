"""GPT-2 in plain PyTorch: load, run, train. Start reading at `gpt2.model`."""

from gpt2.config import SIZES, GPT2Config
from gpt2.model import GPT2, Conv1D, KVCache

__all__ = [
    "GPT2",
    "SIZES",
    "Conv1D",
    "GPT2Config",
    "KVCache",
]
