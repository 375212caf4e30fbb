"""A GGUF file of a model's shape with random weights, to measure speed and memory with, written by the gguf package.

    pip install gguf
    python scripts/make_random_gguf.py 1b.gguf [--quantize q4_0]

The shape is that of Llama 3.2 1B. The tokenizer is the default model's, with unused tokens up to the vocabulary's size.
"""

import argparse
from pathlib import Path

import gguf
import numpy as np

from llamajax import hub

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 8192, 16, 32, 8, 64, 128256
UNUSED = 5  # a kind of token


def add_tokenizer(writer: gguf.GGUFWriter, source: gguf.GGUFReader) -> None:
    """Copies what the default model's file says of its tokenizer."""
    for name, field in source.fields.items():
        if not name.startswith("tokenizer.") or name == "tokenizer.chat_template":
            continue
        value = field.contents()
        if name == gguf.Keys.Tokenizer.LIST:
            value += [f"<unused{i}>" for i in range(len(value), VOCAB)]
        elif name == gguf.Keys.Tokenizer.TOKEN_TYPE:
            value += [UNUSED] * (VOCAB - len(value))
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, field.types[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--quantize", choices=("q4_0", "q8_0"), default="q4_0")
    arguments = parser.parse_args()
    kind = gguf.GGMLQuantizationType[arguments.quantize.upper()]

    writer = gguf.GGUFWriter(arguments.path, "llama")
    writer.add_context_length(131072)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    add_tokenizer(writer, gguf.GGUFReader(hub.resolve(hub.DEFAULT)))

    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        weights = rng.normal(0, 0.02, (rows, columns)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(weights, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))

    matrix("token_embd", VOCAB, HIDDEN)
    norm("output_norm")
    for layer in range(LAYERS):
        norm(f"blk.{layer}.attn_norm")
        matrix(f"blk.{layer}.attn_q", HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{layer}.attn_k", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{layer}.attn_v", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{layer}.attn_output", HIDDEN, HEADS * HEAD_DIM)
        norm(f"blk.{layer}.ffn_norm")
        matrix(f"blk.{layer}.ffn_gate", FFN, HIDDEN)
        matrix(f"blk.{layer}.ffn_up", FFN, HIDDEN)
        matrix(f"blk.{layer}.ffn_down", HIDDEN, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
