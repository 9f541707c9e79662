"""Write a checkpoint of Llama shapes with random weights: what memory and time depend on, and nothing to download.

    python -m benchmarks.shared.make_checkpoint OUT [--shapes llama-3.2-1b] [--shard-bytes 500000000]

bf16, sharded, with an index and the example model's tokenizer. Weights are written a block of rows at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.shared.report import EXAMPLE_MODEL

LLAMA_3_2_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
# The same widths at a twentieth of the weights.
TINY = LLAMA_3_2_1B | {"num_hidden_layers": 1, "vocab_size": 8192}
SHAPES = {"llama-3.2-1b": LLAMA_3_2_1B, "tiny": TINY}

SHARD_BYTES = 500_000_000
BLOCK_WEIGHTS = 1 << 22
BYTES = 2  # of a bf16 weight

Shapes = dict[str, tuple[int, ...]]  # tensor name -> shape


def make_checkpoint(out: Path, shapes: dict[str, Any], shard_bytes: int = SHARD_BYTES, seed: int = 0) -> Path:
    """Write config, tokenizer, index and shards to the directory `out`; `shapes` are LlamaConfig's arguments."""
    config = LlamaConfig(**shapes, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    for file in EXAMPLE_MODEL.glob("tokenizer*"):
        shutil.copy(file, out)
    shards = split({name: tuple(tensor.shape) for name, tensor in state.items()}, shard_bytes)
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(out / file, shard, config.initializer_range, generator)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(math.prod(shape) * BYTES for shard in shards for shape in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return out


def split(shapes: Shapes, shard_bytes: int) -> Sequence[Shapes]:
    """Tensors in order, in shards of at most `shard_bytes` unless one tensor alone is larger."""
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        tensor_bytes = math.prod(shape) * BYTES
        if shards[-1] and size + tensor_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += tensor_bytes
    return shards


def write_shard(path: Path, shapes: Shapes, std: float, generator: torch.Generator) -> None:
    """One safetensors file: length of the header, header, then the tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * BYTES
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape in shapes.values():
            for block in blocks(shape, std, generator):
                file.write(block.to(torch.bfloat16).view(torch.uint8).numpy().data)


def blocks(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Flat float32 blocks of a tensor: Gaussian for a matrix, ones for a norm."""
    weights = math.prod(shape)
    for start in range(0, weights, BLOCK_WEIGHTS):
        block = torch.ones(min(BLOCK_WEIGHTS, weights - start))
        yield block if len(shape) == 1 else block.normal_(0, std, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write")
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_checkpoint(arguments.out, SHAPES[arguments.shapes], arguments.shard_bytes, arguments.seed)


if __name__ == "__main__":
    main()
