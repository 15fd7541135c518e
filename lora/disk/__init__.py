"""Adapters on disk, in PEFT's format; start reading at `checkpoint`."""
