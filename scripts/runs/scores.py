"""Scores by name, and agreement."""

import importlib
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jsonargparse import Namespace

import gpt2
from gpt2.training.scores import DRAWS, Score, Texts, interval

NAMES = "exact, bleu, chrf or file.py:function"


class Corpus:
    """A score of sacrebleu's, from 0 to 100."""

    def __init__(self, name: str) -> None:
        try:
            metrics: Any = importlib.import_module("sacrebleu.metrics")
        except ModuleNotFoundError:
            raise ValueError(f"{name}: pip install 'lora-gpt2[scores]' first.") from None

        kinds = {"bleu": metrics.BLEU, "chrf": metrics.CHRF}
        sentences = {"bleu": {"effective_order": True}}
        self._metric, self._of_one = kinds[name](), kinds[name](**sentences.get(name, {}))

    def __call__(self, texts: Texts, references: Sequence[Texts]) -> float:
        metric = self._metric if len(texts) > 1 else self._of_one
        return metric.corpus_score(*_columns(texts, references)).score

    def interval(self, texts: Texts, references: Sequence[Texts]) -> tuple[float, float]:
        """By sacrebleu's bootstrap."""
        result = self._metric.corpus_score(*_columns(texts, references), n_bootstrap=DRAWS)
        return result._mean - result._ci, result._mean + result._ci


def _columns(texts: Texts, references: Sequence[Texts]) -> tuple[list[str], list[list[str | None]]]:
    """As sacrebleu takes them."""
    most = range(max(map(len, references)))
    columns = [[of[i].strip() if i < len(of) else None for of in references] for i in most]
    return [text.strip() for text in texts], columns


def named(name: str) -> Score:
    """The score of a name."""
    if name == "exact":
        return gpt2.exact_match
    if name in ("bleu", "chrf"):
        return Corpus(name)
    file, _, function = name.rpartition(":")
    if Path(file).suffix != ".py":
        raise ValueError(f"No score {name!r}: give {NAMES}.")

    if function not in (names := runpy.run_path(file)):
        raise ValueError(f"{file} has no function {function}.")
    return names[function]


def check(options: Namespace) -> None:
    """Check the options."""
    if options.score is None and options.choose_by == "score":
        raise ValueError("choose_by score needs --score.")
    if options.score is not None:
        named(options.score)
        if options.validation is None:
            raise ValueError("A score needs --validation.")


def agreed(texts: Texts, score: Score) -> int:
    """The number of the text most like the others (minimum Bayes risk)."""
    others = [[other for j, other in enumerate(texts) if j != i] for i in range(len(texts))]
    values = [
        fmean(score([text], [[o]]) for o in of) for text, of in zip(texts, others, strict=True)
    ]
    return values.index(max(values))


def scored(name: str, texts: Texts, references: Sequence[Texts]) -> dict[str, Any]:
    """A score with its interval."""
    of = named(name), texts, references
    return {"name": name, "prompts": len(texts), "value": of[0](*of[1:]), "interval": interval(*of)}


def result(fit: gpt2.Fit, name: str) -> dict[str, Any]:
    """Of a run's kept weights."""
    assert fit.scorer
    now = scored(name, fit.scorer.texts(fit.model), fit.scorer.references)
    return {**now, "by_step": fit.scores, "seconds": round(fit.scoring, 1)}


def line(result: Mapping[str, Any]) -> str:
    """In words, beside the base's."""
    low, high = result["interval"]
    value = f"{result['name']} {result['value']:.4g} (95 %: {low:.4g} to {high:.4g})"
    if (base := result.get("by_step", {}).get(0)) is None:
        return value
    verdict = "better than" if low > base else "not distinguishable from"
    return f"{value}, {'WORSE than' if high < base else verdict} the base's {base:.4g}"
