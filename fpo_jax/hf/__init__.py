"""Hugging Face model directories: find or download one, read it into a parameter tree, write one.

    directory ──read_config──► ModelConfig      directory ──load_params──► params      params ──export──► directory

hub          files and companions of a model directory, hub downloads
fingerprint  which weights a directory holds, read by all processes that see the same files
load         safetensors -> sharded parameters, one layer at a time; the check of names, shapes and dtypes
mxfp4        experts in four bits, read as bfloat16
companions   what stands beside the weights, as the training had it, and its check against transformers
peft         an adapter with its base as one model, or from and as PEFT's directory
save         parameters -> safetensors, one tensor at a time
upload       a directory -> a repository of the hub
digests      digests of what was written, and their check: `python -m fpo_jax.hf DIRECTORY`

Weights are safetensors only, one file or shards with an index, and cross through the entries of params; torch and
pickle are never involved. Every problem of a directory is reported at once, before a single weight is placed. A model
is never whole on the host, in either direction.
"""

from fpo_jax.hf import companions, upload
from fpo_jax.hf.companions import end_ids
from fpo_jax.hf.fingerprint import weights_fingerprint, weights_fingerprints
from fpo_jax.hf.hub import (
    COMPANIONS,
    INDEX,
    SINGLE,
    adapter_dir,
    check_vocabulary,
    copy_companions,
    local_dir,
    read_config,
)
from fpo_jax.hf.load import check_weights, load_params
from fpo_jax.hf.peft import base_of, check_peft, load_peft, merged, read_peft, write_peft
from fpo_jax.hf.save import export

__all__ = [
    "COMPANIONS",
    "INDEX",
    "SINGLE",
    "adapter_dir",
    "base_of",
    "check_peft",
    "check_vocabulary",
    "check_weights",
    "companions",
    "copy_companions",
    "end_ids",
    "export",
    "load_params",
    "load_peft",
    "local_dir",
    "merged",
    "read_config",
    "read_peft",
    "upload",
    "weights_fingerprint",
    "weights_fingerprints",
    "write_peft",
]
