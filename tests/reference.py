"""GPT-2 in NumPy and float64, from the equations alone: the oracle that the model is held to.

Weights are the tensors of a checkpoint under their published names (`h.0.attn.c_attn.weight`).
Shapes: T time · C n_embd · D head size · V vocab.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x: np.ndarray, w: Weights, name: str, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return centred * scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(x: np.ndarray, w: Weights, name: str, n_head: int) -> np.ndarray:
    T = len(x)
    q, k, v = np.split(linear(x, w, f"{name}.c_attn"), 3, axis=-1)
    future = np.triu(np.ones((T, T), dtype=bool), 1)
    heads = []
    for q_, k_, v_ in zip(*(np.split(m, n_head, axis=-1) for m in (q, k, v)), strict=True):
        scores = q_ @ k_.T / np.sqrt(q_.shape[-1])  # (T, T) from (T, D)
        heads.append(softmax(np.where(future, -np.inf, scores)) @ v_)
    return linear(np.concatenate(heads, -1), w, f"{name}.c_proj")


def forward(w: Weights, ids: list[int], n_head: int, eps: float = 1e-5) -> np.ndarray:
    """Logits `(T, V)` of one row of token ids."""
    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]  # (T, C)
    i = 0
    while f"h.{i}.ln_1.weight" in w:
        x = x + attention(layer_norm(x, w, f"h.{i}.ln_1", eps), w, f"h.{i}.attn", n_head)
        hidden = gelu(linear(layer_norm(x, w, f"h.{i}.ln_2", eps), w, f"h.{i}.mlp.c_fc"))
        x = x + linear(hidden, w, f"h.{i}.mlp.c_proj")
        i += 1
    return layer_norm(x, w, "ln_f", eps) @ w["wte.weight"].T


def loss(w: Weights, ids: list[int], n_head: int, eps: float = 1e-5) -> float:
    """Mean nats a token over the tokens that follow another."""
    probabilities = softmax(forward(w, ids, n_head, eps)[:-1])
    return float(-np.log(probabilities[np.arange(len(ids) - 1), ids[1:]]).mean())


def greedy(w: Weights, ids: list[int], n: int, n_head: int, eps: float = 1e-5) -> list[int]:
    """The `n` tokens that follow, each the likeliest after all before it."""
    text = list(ids)
    for _ in range(n):
        text.append(int(forward(w, text, n_head, eps)[-1].argmax()))
    return text[len(ids) :]
