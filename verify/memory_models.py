"""Models that people train, from transformers' configurations with random weights, and a batch for each.

They come without the head that makes words of the last layer: beside two layers it would weigh more than it does.
Guarantees that nothing is downloaded, that weights and batch are those of one seed, and that dropout is as the
configuration has it. A `module:factory` gives any other model. Must not know what is measured.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invref.errors import InputError, needing

SEED = 20240722
IMAGE, PATCH = 128, 16
"""Pixels a side of an image and of its patches: 64 patches."""
VOCABULARY = 1024
FRAMES = 128
"""Positions of an encoder of speech, each of two frames of sound."""
SMALL = {"hidden": 256, "layers": 2, "heads": 4}
"""The default sizes: two layers tell what any number of equal ones would."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """How transformers names a model, what of its configuration our sizes are, and what it takes.

    sizes: of (hidden, layers, heads) to the configuration's arguments.
    """

    config: str
    model: str
    sizes: Callable[[int, int, int], dict[str, Any]]
    batch: str = "text"


def _decoder(hidden: int, layers: int, heads: int, wide: float = 3.5) -> dict[str, Any]:
    """Llama's names; the perceptron of Llama 3 8B and of Mistral 7B is 3.5 times as wide as the rest."""
    return {
        "hidden_size": hidden, "intermediate_size": int(wide * hidden), "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": hidden // heads,
        "vocab_size": VOCABULARY, "pad_token_id": 0,
    }  # fmt: skip


def _encoder(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }  # fmt: skip


def _text_encoder(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {**_encoder(hidden, layers, heads), "vocab_size": VOCABULARY}


def _image_encoder(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {**_encoder(hidden, layers, heads), "image_size": IMAGE, "patch_size": PATCH}


FAMILIES = {
    "bert": Family("BertConfig", "BertModel", _text_encoder),
    "gpt2": Family(
        "GPT2Config", "GPT2Model",
        lambda hidden, layers, heads: {
            "n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": VOCABULARY, "n_positions": 4096,
            "bos_token_id": 0, "eos_token_id": 0,
        },
    ),
    "llama": Family("LlamaConfig", "LlamaModel", _decoder),
    "mistral": Family("MistralConfig", "MistralModel", _decoder),
    "qwen3": Family("Qwen3Config", "Qwen3Model", lambda h, n, a: _decoder(h, n, a, 3.0)),
    "gemma2": Family("Gemma2Config", "Gemma2Model", lambda h, n, a: _decoder(h, n, a, 4.0)),
    "vit": Family("ViTConfig", "ViTModel", _image_encoder, "image"),
    "clip": Family("CLIPVisionConfig", "CLIPVisionModel", _image_encoder, "image"),
    "t5": Family(
        "T5Config", "T5Model",
        lambda hidden, layers, heads: {
            "d_model": hidden, "d_ff": int(2.6875 * hidden), "num_layers": layers, "num_heads": heads,
            "d_kv": hidden // heads, "vocab_size": VOCABULARY, "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0, "pad_token_id": 0,
        },
        "pair",
    ),
    "modernbert": Family(
        "ModernBertConfig", "ModernBertModel",
        lambda hidden, layers, heads: {
            **_text_encoder(hidden, layers, heads), "intermediate_size": int(1.5 * hidden), "pad_token_id": 0,
            "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0,
        },
    ),
    "whisper": Family(
        "WhisperConfig", "WhisperModel",
        lambda hidden, layers, heads: {
            "d_model": hidden, "encoder_layers": layers, "decoder_layers": layers, "encoder_attention_heads": heads,
            "decoder_attention_heads": heads, "encoder_ffn_dim": 4 * hidden, "decoder_ffn_dim": 4 * hidden,
            "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
            "decoder_start_token_id": 0, "max_target_positions": 4096,
            "max_source_positions": FRAMES, "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "speech",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is asked for; None where the default is meant. dropout: False sets every rate of the configuration to 0."""

    batch: int = 4
    length: int = 128
    hidden: int | None = None
    layers: int | None = None
    dropout: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)


def built(name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
    """A model in training mode and a batch for it, of a family or of a factory `module:name`.

    A factory takes nothing and returns the model, and the example that `invref.plan` takes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if ":" in name:
            return _made(name, device)
        if name not in FAMILIES:
            raise InputError(f"unknown model {name!r}: use {', '.join(FAMILIES)}, or module:factory")
        return _family(FAMILIES[name], sizes, dtype, device)


def read(path: Path) -> dict[str, Any]:
    """A configuration's arguments from a JSON file, as transformers saves it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"the configuration {path} must be a JSON object of transformers' arguments")
    return {key: value for key, value in found.items() if key not in ("architectures", "transformers_version")}


def _family(family: Family, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Batch]:
    with needing("invref-verify memory"):
        transformers = importlib.import_module("transformers")
    hidden, layers = sizes.hidden or SMALL["hidden"], sizes.layers or SMALL["layers"]
    if hidden % SMALL["heads"]:
        raise InputError(f"a hidden size of {hidden} does not split over {SMALL['heads']} heads: use a multiple of 4")
    arguments = {**family.sizes(hidden, layers, SMALL["heads"]), **sizes.config}
    try:
        config = getattr(transformers, family.config)(**arguments)
        for key, value in config.to_dict().items():
            if not sizes.dropout and isinstance(value, float) and re.search("drop(out|$)|pdrop|_rate$", key):
                setattr(config, key, 0.0)
        model: nn.Module = getattr(transformers, family.model)(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"transformers cannot build {family.model}: {' '.join(str(error).split())}") from error
    return model.to(device, dtype).train(), _batch(family.batch, config, sizes, dtype, device)


def _batch(kind: str, config: Any, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Batch:
    shape = (sizes.batch, sizes.length)
    if kind == "image":
        side = config.image_size
        return {"pixel_values": torch.randn(sizes.batch, config.num_channels, side, side).to(device, dtype)}
    tokens = torch.randint(1, config.vocab_size, shape)
    tokens = tokens.to(device)
    if kind == "speech":
        features = torch.randn(sizes.batch, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": features.to(device, dtype), "decoder_input_ids": tokens}
    return {"input_ids": tokens, "decoder_input_ids": tokens} if kind == "pair" else {"input_ids": tokens}


def _made(name: str, device: torch.device) -> tuple[nn.Module, Any]:
    module, _, factory = name.partition(":")
    try:
        call = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"cannot find {name}: {error}") from error
    try:
        made = call()
    except Exception as error:  # whatever somebody else's function raises is bad input
        raise InputError(f"{name} raised {type(error).__name__}: {error}; call it by itself") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise InputError(f"{name} must return a model and an example: `return model, example`")
    model, example = made
    return model.to(device), _moved(example, device)


def _moved(example: Any, device: torch.device) -> Any:
    if isinstance(example, Tensor):
        return example.to(device)
    if isinstance(example, Mapping):
        return {key: _moved(value, device) for key, value in example.items()}
    if isinstance(example, tuple | list):
        return tuple(_moved(value, device) for value in example)
    return example
