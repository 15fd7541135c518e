"""What all tests share: the demo base, the tokenizer, threads, signals, and no network."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import socket
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

# Read when torch is loaded, here and in the processes that tests start: see scripts/command.py.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes of the suite share two cores

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

import lora
from gpt2.config import GPT2Config
from gpt2.model import GPT2
from gpt2.tokenizer import Tokenizer
from tests.toys import IDX, randomize, tiny_gpt2

# Timings of a shared machine say nothing about an example.
settings.register_profile("timeless", deadline=None, derandomize=True)
settings.load_profile("timeless")

# The promises of bits and of rounding are kept by several threads too.
TWO_THREADS = ["test_exactness", "test_layer", "test_merge", "test_packing", "test_population"]
TWO_THREADS += ["test_routing", "test_state_machine"]
# The files that take longest begin first, so that no core is idle at the end. `--dist loadfile`
# would begin with those of the most tests.
FIRST = "torchrun scripts search tour generate beams command_line bad_data store pretrained fit"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(FIRST.split())}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def demo() -> GPT2:
    """The bundled base, float32, in eval mode; a test that changes it takes a deepcopy."""
    return GPT2.from_pretrained("demo")


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a base that costs next to nothing, for what does not depend on the base."""
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=32)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def quick(small_base, script, monkeypatch) -> list[str]:
    """The arguments of a run of three steps on the small base, which draws no picture."""
    from tests.script_runs import QUICK

    monkeypatch.setattr(script("page.charts"), "png", lambda charts, file: file.touch())
    return [*QUICK, "--model_name", small_base]


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's run: its folder, and what it printed. Processes of one suite share it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, printed = shared / "runs" / "demo", shared / "demo.txt"
    train = importlib.import_module("scripts.train_qa").main
    with FileLock(shared / "demo.lock"):
        if not printed.exists():
            out, error = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
                assert train(["--device", "cpu", "--res_path", str(folder)]) == 0
            assert error.getvalue() == ""
            printed.write_text(out.getvalue(), encoding="utf-8")
    return folder, printed.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def demo_expected() -> dict:
    """What an independent implementation computes with the demo base."""
    return json.loads((files("gpt2") / "assets" / "demo" / "expected.json").read_text())


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder with an adapter for `tiny_gpt2`, and the logits it gives."""
    model = tiny_gpt2()
    lora.inject(model, r=4, alpha=6, dropout=0.25, targets=("c_attn", "mlp.c_fc"), seed=0)
    randomize(model)
    lora.save(model, tmp_path / "adapter")
    return tmp_path / "adapter", model(IDX)


@pytest.fixture
def script():
    """Import a script, or a room of theirs, by its name."""
    return lambda name: importlib.import_module(f"scripts.{name}")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One, which is as fast for small models and leaves other work its processors."""
    module = request.module.__name__.rpartition(".")[2]
    torch.set_num_threads(2 if module in TWO_THREADS else 1)


@pytest.fixture(scope="session", autouse=True)
def _signals() -> Iterator[socket.socket]:
    """SIGTERM ends the run as Ctrl-C does. The socket gives the number of each signal that came."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield reader
    signal.signal(signal.SIGTERM, before)
    signal.set_wakeup_fd(-1)


@pytest.fixture(autouse=True)
def _signals_end_the_run(_signals: socket.socket, monkeypatch: pytest.MonkeyPatch):
    """A script under test ends at a signal, and pytest goes on: not if no test sent the signal."""
    sent, kill = set[int](), os.kill

    def noted(pid: int, number: int) -> None:
        if pid == os.getpid():
            sent.add(number)
        kill(pid, number)

    monkeypatch.setattr(os, "kill", noted)
    yield
    try:
        came = set(_signals.recv(1000)) - sent
    except BlockingIOError:
        return
    if came:
        pytest.exit(f"stopped by {signal.Signals(min(came)).name}", 128 + min(came))


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C and a closed terminal are heeded, by processes that are started here too.

    Where `nohup` or the background of a shell started pytest they are ignored, which is inherited.
    """
    names = {"SIGINT", "SIGHUP"} & signal.Signals.__members__.keys()
    stops = [signal.Signals[name] for name in names]
    ignored = [number for number in stops if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch):
    """Fail the test that tries to leave this machine, even if what it calls hides the error."""
    tried: list[object] = []

    def guard(name: str, host_of) -> None:
        real = getattr(socket if name == "getaddrinfo" else socket.socket, name)

        def guarded(*args, **kwargs):
            host = host_of(*args)
            if host is not None and host not in LOOPBACK:
                tried.append(host)
                raise OSError(f"a test may not reach {host!r}")
            return real(*args, **kwargs)

        monkeypatch.setattr(socket if name == "getaddrinfo" else socket.socket, name, guarded)

    def address_host(_, address):
        return address[0] if isinstance(address, tuple) else None  # a path is a local socket

    guard("getaddrinfo", lambda host, *_: host)
    guard("connect", address_host)
    guard("connect_ex", address_host)
    yield
    assert not tried, f"the test tried to reach {tried}"
