"""Arithmetic on adapters as values: exact sums, and lower ranks with the error that they cost."""

from lora.algebra.ranks import Approximation, approximate, compress, dare, extract, ties
from lora.algebra.sums import (
    Factors,
    add,
    combine,
    deltas,
    factors,
    implant,
    read,
    scale,
    subtract,
)

__all__ = [
    "Approximation",
    "Factors",
    "add",
    "approximate",
    "combine",
    "compress",
    "dare",
    "deltas",
    "extract",
    "factors",
    "implant",
    "read",
    "scale",
    "subtract",
    "ties",
]
