"""GPT-2 in plain PyTorch: load, run, train. Start reading at `gpt2.model`."""

import typing

from gpt2.config import SIZES, GPT2Config
from gpt2.data.batches import Batch, batches
from gpt2.data.encoding import encode
from gpt2.data.examples import (
    Example,
    from_texts,
    read_examples,
    read_prompts,
    stream_examples,
)
from gpt2.data.store import open_data
from gpt2.data.tokens import Dataset
from gpt2.generation import generate, stream
from gpt2.layers import Conv1D
from gpt2.model import GPT2
from gpt2.sampling import GenerateConfig
from gpt2.tokenizer import Tokenizer
from gpt2.training.config import TrainConfig
from gpt2.training.evaluation import Evaluation, evaluate
from gpt2.training.fitting import Fit, fit
from gpt2.training.loop import StepRecord, Training, train
from gpt2.training.loss import IGNORE, next_token_loss
from gpt2.training.run_config import RunConfig
from gpt2.training.schedule import learning_rate, total_steps
from gpt2.training.wrapped import summed_loss

__all__ = [
    "GPT2",
    "IGNORE",
    "SIZES",
    "Batch",
    "Conv1D",
    "Dataset",
    "Evaluation",
    "Example",
    "Fit",
    "GPT2Config",
    "GenerateConfig",
    "RunConfig",
    "StepRecord",
    "Tokenizer",
    "TrainConfig",
    "Training",
    "batches",
    "encode",
    "evaluate",
    "fit",
    "from_texts",
    "generate",
    "learning_rate",
    "next_token_loss",
    "open_data",
    "read_examples",
    "read_prompts",
    "stream",
    "stream_examples",
    "summed_loss",
    "total_steps",
    "train",
]

if typing.TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version  # not at the top: few ask

        return version("lora-gpt2")
