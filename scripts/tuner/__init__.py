"""A search: space, rungs, trials, outcome."""
