"""A search: its space, its rungs, its trials, what came out."""
