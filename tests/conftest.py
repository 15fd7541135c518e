"""What all tests share: the demo base, the tokenizer, two threads, and no network."""

from __future__ import annotations

import importlib
import json
import socket
from importlib.resources import files

import pytest
import torch
from hypothesis import settings

from gpt2.model import GPT2
from gpt2.tokenizer import Tokenizer

# Timings of a shared machine say nothing about an example.
settings.register_profile("timeless", deadline=None, derandomize=True)
settings.load_profile("timeless")

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(scope="session")
def demo() -> GPT2:
    """The bundled base, float32, in eval mode; a test that changes it takes a deepcopy."""
    return GPT2.from_pretrained("demo")


@pytest.fixture(scope="session")
def demo_expected() -> dict:
    """What an independent implementation computes with the demo base."""
    return json.loads((files("gpt2") / "assets" / "demo" / "expected.json").read_text())


@pytest.fixture
def script():
    """Import a script, or a room of theirs, by its name."""
    return lambda name: importlib.import_module(f"scripts.{name}")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


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
