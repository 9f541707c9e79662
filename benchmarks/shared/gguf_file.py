"""A Llama checkpoint with a byte-level BPE tokenizer as a GGUF file, and llama.cpp's own quantised versions of it.

    python -m benchmarks.shared.gguf_file MODEL OUT.gguf [--type F32|F16|Q8_0|Q4_0|…]

Small on purpose: the models of this repository, not all of the world's. Tensors have ggml's names; rows of q and k are
reordered, because ggml's rotary embedding of this architecture turns neighbouring coordinates where transformers turns
halves. F32 holds a bf16 checkpoint exactly.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from waterfill.files import gguf
from waterfill.files.ggml import silence
from waterfill.files.gguf import ALIGNMENT, FILE_TYPES, TENSOR_TYPES, Entry
from waterfill.files.llama_names import gguf_name

DTYPES = {"F32": np.float32, "F16": np.float16}
NORMAL, CONTROL = 1, 3  # kinds of tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=[*DTYPES, *FILE_TYPES], default="F16")
    arguments = parser.parse_args()
    if arguments.type in DTYPES:
        write_gguf(arguments.model, arguments.out, arguments.type)
    else:
        whole = write_gguf(arguments.model, arguments.out.with_suffix(".F32.gguf"), "F32")
        quantise(whole, arguments.out, arguments.type)
        whole.unlink()


def write_gguf(model: Path, out: Path, kind: str = "F32", *, add_bos: bool | None = None) -> Path:
    """Write the Llama in directory `model`; matrices as F32 or F16, norms as F32. `add_bos` as the tokenizer has it."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    if config["model_type"] != "llama":
        raise SystemExit(f"{model} is a {config['model_type']}; only Llama models are converted here")
    weights = _weights(model)
    if unknown := [name for name in weights if gguf_name(name) is None]:
        raise SystemExit(f"{model} has a tensor {unknown[0]}; only Llama models are converted here")
    tensors = {str(gguf_name(name)): _rows(name, tensor, config) for name, tensor in weights.items()}
    metadata = {**_shapes(config), **_vocabulary(model, config, add_bos)}
    written = []
    for name, tensor in tensors.items():
        stored = "F32" if tensor.ndim == 1 else kind
        data = tensor.astype(DTYPES[stored]).tobytes()
        written.append((Entry(name, tensor.shape, TENSOR_TYPES[stored]), len(data), (data,)))
    with out.open("wb") as file:
        gguf.write_gguf(file, metadata, written)
    return out


def quantise(source: Path, out: Path, kind: str, threads: int = 1) -> Path:
    """The GGUF file `source` in one of llama.cpp's types, by llama.cpp itself."""
    import llama_cpp

    silence(llama_cpp.llama_cpp)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = FILE_TYPES[kind], threads
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    if failed:
        raise RuntimeError(f"llama.cpp could not write {out.name} as {kind}")
    return out


def _weights(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _rows(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> np.ndarray:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    count = next((heads[part] for part in heads if part in name), None)
    if count is not None:  # [heads, 2 halves, pairs, in] -> [heads, pairs, 2, in]
        rows, width = tensor.shape
        tensor = tensor.reshape(count, 2, rows // count // 2, width).transpose(1, 2).reshape(rows, width)
    return tensor.float().numpy()


def _shapes(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    return {
        "general.architecture": "llama",
        "general.name": "converted",
        "general.alignment": ALIGNMENT,
        "llama.vocab_size": config["vocab_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": head,
        "llama.attention.value_length": head,
        "llama.rope.dimension_count": head,
        "llama.rope.freq_base": float(theta),
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
    }


def _vocabulary(model: Path, config: dict[str, Any], add_bos: bool | None) -> dict[str, Any]:
    """A byte-level BPE tokenizer as llama.cpp has it. Without tokenizer.json there is none."""
    if not (model / "tokenizer.json").exists():
        return {"tokenizer.ggml.model": "no_vocab"}
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    bpe = tokenizer["model"]
    words = dict(sorted((number, word) for word, number in bpe["vocab"].items()))
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    words |= special
    tokens = [words.get(number, f"[unused{number}]") for number in range(config["vocab_size"])]
    processor = json.dumps(tokenizer["post_processor"] or {})
    begins = any(json.dumps(token) in processor for token in special.values())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if number in special else NORMAL for number in range(len(tokens))],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.add_bos_token": begins if add_bos is None else add_bos,
    }


if __name__ == "__main__":
    main()
