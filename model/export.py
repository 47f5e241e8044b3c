"""A folder that `transformers` loads: AutoModelForCausalLM and AutoTokenizer, no custom code.

Parameter names are already Hugging Face's, so this writes the weights as they are, and describes the shape and the tokenizer
in the JSON files that library looks for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.durable import write_durably
from model.errors import CheckpointError, DataError
from model.tokenizer import END_OF_TEXT, Tokenizer
from model.weights import encode_chunks

__all__ = ["export_huggingface"]


def export_huggingface(folder: Path, *, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: bytes) -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    Args:
        folder: made if missing; files of these names are replaced.
        config: the model's shape.
        weights: the model's state dict.
        tokenizer: the bytes of its tokenizer.json.

    Raises:
        DataError: the tokenizer does not belong to the model.
        CheckpointError: the folder can not be written.
    """
    loaded = Tokenizer(tokenizer)
    if loaded.vocab_size != config.vocab_size:
        raise DataError(
            f"the tokenizer has {loaded.vocab_size} tokens and the model {config.vocab_size}; use the run's own tokenizer"
        )
    documents = {
        "config.json": _model_config(config, loaded.eot_id),
        "generation_config.json": {"bos_token_id": loaded.eot_id, "eos_token_id": loaded.eot_id},
        "tokenizer_config.json": _tokenizer_config(config),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / "model.safetensors", encode_chunks(weights, metadata={"format": "pt"}))
        write_durably(folder / "tokenizer.json", [tokenizer])
        for name, document in documents.items():
            write_durably(folder / name, [json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"])
    except OSError as error:
        raise CheckpointError(
            f"can not export to {folder}: {error.strerror}; free space or name another folder"
        ) from None


def _model_config(config: ModelConfig, eot_id: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_sequence_tokens,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # Version 5 of transformers reads rope_parameters and dtype; version 4 reads rope_theta and torch_dtype.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "dtype": "float32",
        "torch_dtype": "float32",
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
    }


def _tokenizer_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": config.max_sequence_tokens,
        "clean_up_tokenization_spaces": False,
    }
