"""Adapters on disk: PEFT's format, its config, probes of what was saved, loralib's files."""
