"""Adapters on disk, in PEFT's format; start reading at `checkpoint`.

checkpoint     save and load
folder         what a folder holds, by the paths of a model
fitting        those parts fitted to a model, and all that does not fit
peft_config    adapter_config.json read; peft_writing writes it
probes         by which another base, or swapped factors, are told
files          safetensors as bytes; writing puts files in their places
hub            from a name to files; card writes a README.md
loralib        the checkpoints that loralib published
strict_json    JSON that means one thing
"""
