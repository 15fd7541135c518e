"""An adapter in the formats of other programs, and those programs' answers."""

import json
import tempfile
from collections.abc import Callable, Iterable
from importlib import import_module
from itertools import islice, takewhile, zip_longest
from pathlib import Path

import torch

import gpt2
import lora
from gpt2.files import written
from lora.algebra import Factors
from lora.disk import exports as lora_exports

READERS = {
    "gguf": "llama_cpp",
    "gguf-lora": "llama_cpp",
    "mlx": "mlx_lm",
    "merged": "transformers",
}
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
ADAPTERS = "adapters"  # mlx-lm's, in the folder of the base
NEW_TOKENS = 24  # after each prompt that is compared
TIE = 0.02  # nats: llama.cpp's GELU is a table of float16

Rows = list[list[int]]
Continue = Callable[[list[int]], Iterable[int]]


def write(form: str, model: gpt2.GPT2, out: Path, dtype: str) -> None:
    """Write an adapted model, which is then the base, or merged."""
    values = dict[str, Factors]()
    if form in ("gguf-lora", "mlx"):
        values = lora.algebra.factors(model)
        if others := [path for path in values if not path.endswith(LINEARS)]:
            raise ValueError(f"{form} cannot hold {', '.join(others)}: use gguf or merged.")
    lora.eject(model, merge=not values)
    if form == "gguf":
        with written(out.parent) as made:
            write_gguf(model, made / out.name, dtype)
    elif form == "gguf-lora":
        with written(out.parent) as made:
            lora_exports.write_gguf(values, made / out.name, "gpt2", _names(model))
    else:
        model.save_pretrained(str(out))
        gpt2.Tokenizer().save_pretrained(out)
    if form == "mlx":
        with written(out / ADAPTERS) as made:
            lora_exports.write_mlx(values, made, model.config.n_layer, "transformer.h")


def write_gguf(model: gpt2.GPT2, file: Path, dtype: str = "float32") -> None:
    """Write a plain model and its tokenizer for llama.cpp."""
    gguf = import_module("gguf")
    vocabulary = gpt2.Tokenizer()
    config = model.config
    half = dtype == "float16"
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_file_type(gguf.LlamaFileType["MOSTLY_F16" if half else "ALL_F32"])
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    with tempfile.TemporaryDirectory() as folder:
        vocabulary.save_pretrained(folder)
        ranks = json.loads(Path(folder, "vocab.json").read_text("utf-8"))
        writer.add_token_list(list(ranks))
        merges = Path(folder, "merges.txt").read_text("utf-8").splitlines()
        writer.add_token_merges(merges[1:])  # below the version
    kinds = dict.fromkeys(ranks.values(), gguf.TokenType.NORMAL)
    writer.add_token_types([*(kinds | {vocabulary.eos: gguf.TokenType.CONTROL}).values()])
    writer.add_bos_token_id(vocabulary.eos)
    writer.add_eos_token_id(vocabulary.eos)

    name_of = _names(model)
    for path, tensor in model.state_dict().items():
        name, _, part = path.rpartition(".")
        if name == "lm_head":  # the embedding once more
            continue
        if part == "weight" and name.endswith(LINEARS):
            tensor = tensor.T
        narrow = half and tensor.dim() == 2 and name != "transformer.wpe"
        kept = torch.float16 if narrow else torch.float32
        array = tensor.contiguous().to(kept).numpy()
        writer.add_tensor(f"{name_of(name)}.{part}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def answers(form: str, model: gpt2.GPT2, out: Path, ids: Rows) -> Rows:
    """Each prompt's greedy tokens by the format's reader."""
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = out, None
        if form == "gguf-lora":
            base, adapter = Path(folder, "base.gguf"), out
            write_gguf(model, base)
        if form == "mlx":
            go_on = _mlx_lm(out)
        elif form == "merged":
            go_on = _transformers(out)
        else:
            go_on = _llama_cpp(base, adapter)
        end = gpt2.Tokenizer().eos
        first = ([*islice(go_on(row), NEW_TOKENS)] for row in ids)
        return [[*takewhile(lambda token: token != end, row)] for row in first]


@torch.no_grad()
def margins(model: gpt2.GPT2, ids: Rows, made: Rows) -> list[list[float]]:
    """By how many nats each token, and the one after, led its rival."""
    rows: list[list[float]] = []
    for row, more in zip(ids, made, strict=True):
        first, second = model(torch.tensor([row + more]))[0, len(row) - 1 :].topk(2).values.T
        rows.append((first - second).tolist())
    return rows


def agreement(ours: Rows, theirs: Rows, leads: list[list[float]]) -> tuple[int, int, int | None]:
    """Tokens that agree, all tokens up to a tie, and the first row that differs."""
    same, total, differing = 0, 0, None
    for i, (one, other, lead) in enumerate(zip(ours, theirs, leads, strict=True)):
        pairs = enumerate(zip_longest(one, other))
        n = next((k for k, (a, b) in pairs if a != b), len(one))
        parts = n < max(len(one), len(other)) and lead[n] > TIE
        same += n
        total += max(len(one), len(other)) if parts else n
        differing = i if parts and differing is None else differing
    return same, total, differing


def _llama_cpp(file: Path, adapter: Path | None) -> Continue:
    llama = import_module("llama_cpp")
    cache = dict.fromkeys(("type_k", "type_v"), llama.GGML_TYPE_F32)  # as ours; else float16
    more = {"lora_path": str(adapter)} if adapter else {}
    model = llama.Llama(str(file), n_ctx=0, verbose=False, **cache, **more)
    return lambda row: model.generate(row, temp=0.0, repeat_penalty=1.0)


def _mlx_lm(out: Path) -> Continue:
    array = import_module("mlx.core").array
    step = import_module("mlx_lm.generate").generate_step
    adapter = str(out / ADAPTERS)
    model, _ = import_module("mlx_lm").load(str(out), adapter_path=adapter)
    return lambda row: (int(token) for token, _ in step(array(row), model))


def _transformers(out: Path) -> Continue:
    auto = import_module("transformers").AutoModelForCausalLM
    model = auto.from_pretrained(out)
    how = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    return lambda row: model.generate(torch.tensor([row]), **how)[0, len(row) :].tolist()


def _names(model: gpt2.GPT2) -> Callable[[str], str]:
    """From a module's path to llama.cpp's name of it."""
    gguf = import_module("gguf")
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer).get_name
