"""GPT-2 in plain PyTorch: load, run, train. `help(gpt2.train)` explains one.

The model, where reading starts (`gpt2.model`):
    GPT2                  the network: `GPT2.from_pretrained("gpt2")`
    GPT2Config            its sizes and dropouts
    SIZES                 those of the published models
    Conv1D                a linear layer that keeps its weight as (in, out)
    Tokenizer             text to ids, and back

Data:
    Example               a prompt and its completion
    read_examples         the examples of a file, or its prompts
    stream_examples       the same, one at a time
    encode                texts or examples to a Dataset
    open_data             a file to a Dataset that is kept on disk
    Dataset               tokenised examples
    batches               their batches, in the order of an epoch
    Batch                 padded or packed rows
    IGNORE                the label of what is not learnt

Training:
    train                 a loop over steps; whatever requires grad is trained
    TrainConfig           its options: learning rate, steps, batch, schedule, seed
    Training              what `train` gives: the run, step after step
    StepRecord            the metrics of a step
    fit                   train with validation, early stopping and snapshots
    RunConfig             when to do which
    Fit                   what `fit` gives
    evaluate              the loss on held-out data
    Evaluation            its result
    exact_match           a score of generated texts
    total_steps           how many steps a run has
    next_token_loss       the loss of logits and labels
    summed_loss           the same from a model, its logits never whole

Text:
    generate              new tokens for each prompt
    stream                the same, as they come
    GenerateConfig        how: length, temperature, beams, seed
"""

from gpt2.config import SIZES as SIZES
from gpt2.config import GPT2Config as GPT2Config
from gpt2.data.batches import Batch as Batch
from gpt2.data.batches import batches as batches
from gpt2.data.dataset import Dataset as Dataset
from gpt2.data.dataset import encode as encode
from gpt2.data.examples import Example as Example
from gpt2.data.examples import read_examples as read_examples
from gpt2.data.examples import stream_examples as stream_examples
from gpt2.data.store import open_data as open_data
from gpt2.generation import generate as generate
from gpt2.generation import stream as stream
from gpt2.loss import IGNORE as IGNORE
from gpt2.loss import next_token_loss as next_token_loss
from gpt2.model import GPT2 as GPT2
from gpt2.model import Conv1D as Conv1D
from gpt2.sampling import GenerateConfig as GenerateConfig
from gpt2.tokenizer import Tokenizer as Tokenizer
from gpt2.training.config import RunConfig as RunConfig
from gpt2.training.config import TrainConfig as TrainConfig
from gpt2.training.config import total_steps as total_steps
from gpt2.training.evaluation import Evaluation as Evaluation
from gpt2.training.evaluation import evaluate as evaluate
from gpt2.training.fitting import Fit as Fit
from gpt2.training.fitting import fit as fit
from gpt2.training.loop import StepRecord as StepRecord
from gpt2.training.loop import Training as Training
from gpt2.training.loop import train as train
from gpt2.training.losses import summed_loss as summed_loss
from gpt2.training.scores import exact_match as exact_match
