"""Small valid files and requests of every kind that llamajax reads. Their models answer in milliseconds."""

import json
from functools import cache
from hashlib import sha256
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llamajax.formats import FORMATS
from llamajax.tokenizers.hf import byte_alphabet
from llamajax.types import Message

from .mutations import GGUF, GGUFTensor, json_bytes

TEXTS = ["", "Hi", "  a b\n", "naïve 🦙 <|im_end|></s>", "1234 <0x0A>▁x"]
MESSAGES: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|> 🦙"}]

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["a b", "ab c", "Ġ a", "H i"]
PIECES = ["▁", "H", "i", "a", "b", "▁H", "▁Hi", "ab", "é"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENAI = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": MESSAGES, "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"]},
}
LINES: list[dict[str, Any]] = [
    {"prompt": "Hi", "max_tokens": 2, "temperature": 0, "id": 7},
    {"messages": MESSAGES, "max_new_tokens": 3, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop": "x"},
    {"prompt": [1, 2, 3], "logprobs": 2, "presence_penalty": 0.5, "frequency_penalty": 0.5, "stop_token_ids": [5]},
    {"prompt": "a", "min_tokens": 1, "ignore_eos": True, "logit_bias": {"5": 3.5}, "n": 1, "max_tokens": 2},
    OPENAI,
    OPENAI | {"url": "/v1/completions", "body": {"prompt": "Hi", "max_tokens": 2, "logprobs": 1, "user": "u"}},
]


def tiny_gguf(format: str) -> GGUF:
    """A Llama with a layer, its matrices in one format where their rows are long enough, else in Q8_0."""
    is_bpe = format != "f32"
    vocab = _byte_level_tokens() if is_bpe else _pieces()
    long = FORMATS[format].weights == 256 if format in FORMATS else False
    D, ffn, heads, head_dim = 256 if long else 32, 32, 2, 16
    file = GGUF()
    for name, value in {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.vocab_size": len(vocab),
        "llama.context_length": 128,
        "llama.embedding_length": D,
        "llama.feed_forward_length": ffn,
        "llama.block_count": 1,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.scaling.type": "none",
        "tokenizer.ggml.model": "gpt2" if is_bpe else "llama",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocab,
        **(
            {"tokenizer.ggml.merges": MERGES}
            if is_bpe
            else {"tokenizer.ggml.scores": [-float(i) for i in range(len(vocab))]}
        ),
        "tokenizer.ggml.token_type": [_token_type(token) for token in vocab],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": not is_bpe,
        "tokenizer.chat_template": CHATML,
    }.items():
        file.add(name, value)  # fmt: skip
    q, k = heads * head_dim, head_dim
    rng = np.random.default_rng(0)
    for name, rows, columns in [
        ("token_embd", len(vocab), D), ("blk.0.attn_q", q, D), ("blk.0.attn_k", k, D), ("blk.0.attn_v", k, D),
        ("blk.0.attn_output", D, q), ("blk.0.ffn_gate", ffn, D), ("blk.0.ffn_up", ffn, D), ("blk.0.ffn_down", D, ffn),
    ]:  # fmt: skip
        kept = "q8_0" if long and columns < 256 else format
        file.tensors.append(GGUFTensor(f"{name}.weight", [columns, rows], *_stored(rng, kept, rows * columns)))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        file.tensors.append(GGUFTensor(f"{name}.weight", [D], 0, np.ones(D, np.float32).tobytes()))
    return file


def _stored(rng: np.random.Generator, format: str, size: int) -> tuple[int, bytes]:
    if format not in FORMATS:
        number, dtype = {"f32": (0, np.float32), "f16": (1, np.float16), "bf16": (30, jax.numpy.bfloat16)}[format]
        return number, rng.normal(0, 0.05, size).astype(dtype).tobytes()
    ggml_type, weights, bytes_ = FORMATS[format]
    # Bytes below 0x2c make each scale in float16 a small number, wherever it is in a block.
    return ggml_type, rng.integers(0, 0x2C, size // weights * bytes_, np.uint8).tobytes()


def _byte_level_tokens() -> list[str]:
    return [*SPECIAL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def _pieces() -> list[str]:
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]


def _token_type(token: str) -> int:
    if token == "<unk>":
        return 2
    if token in (*SPECIAL, "<s>", "</s>"):
        return 3
    return 6 if token.startswith("<0x") else 1


@cache
def _tokenizer_json() -> dict[str, Any]:
    vocab = {token: i for i, token in enumerate(_byte_level_tokens())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [(a, b) for a, b in map(str.split, MERGES)]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
    backend.add_special_tokens(SPECIAL)
    return json.loads(backend.to_str())


@cache
def sentencepiece_model() -> ModelProto:
    model = ModelProto()
    for i, piece in enumerate(_pieces()):
        model.pieces.add(piece=piece, score=-float(i), type=_token_type(piece))
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    return model


SAVED_TEXT = "Once upon a time"
SAVED_IDS = np.arange(16, dtype=np.int32).reshape(2, 8)


@cache
def saved_logits() -> bytes:
    logits = -np.random.default_rng(0).random((2, 3, 16)).astype(np.float16)
    digest = sha256(SAVED_TEXT.encode()).hexdigest()
    return safetensors.numpy.save({"token_ids": SAVED_IDS, "logits": logits}, {"text_sha256": digest})


@cache
def directory() -> dict[str, bytes]:
    """The files of a checkpoint directory in Hugging Face's layout."""
    D, ffn, V = 32, 32, len(_byte_level_tokens())
    rng = np.random.default_rng(0)
    shapes = {"embed_tokens": (V, D), "norm": (D,)} | {
        f"layers.0.{name}": shape
        for name, shape in {
            "input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.q_proj": (D, D),
            "self_attn.k_proj": (16, D), "self_attn.v_proj": (16, D), "self_attn.o_proj": (D, D),
            "mlp.gate_proj": (ffn, D), "mlp.up_proj": (ffn, D), "mlp.down_proj": (D, ffn),
        }.items()
    }  # fmt: skip
    weights = {f"model.{name}.weight": rng.normal(0, 0.05, shape).astype(np.float16) for name, shape in shapes.items()}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": D,
        "intermediate_size": ffn, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "float16", "eos_token_id": [2, 0],
        "attention_bias": False,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }  # fmt: skip
    tokens: dict[str, Any] = {
        "bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}, "add_bos_token": False,
        "pad_token": "<|endoftext|>", "chat_template": [{"name": "default", "template": CHATML}],
        "added_tokens_decoder": {str(i): {"content": token, "special": True} for i, token in enumerate(SPECIAL)},
    }  # fmt: skip
    return {
        "config.json": json_bytes(config),
        "generation_config.json": json_bytes({"eos_token_id": 2, "temperature": 0.6}),
        "tokenizer.json": json_bytes(_tokenizer_json()),
        "tokenizer_config.json": json_bytes(tokens),
        "model.safetensors": safetensors.numpy.save(weights, {"format": "pt"}),
    }


@cache
def other_layouts() -> dict[str, dict[str, bytes]]:
    """Directories that have a certain file, and what goes with it."""
    files = directory()
    shard = "model-00001-of-00001.safetensors"
    names = list(safetensors.numpy.load(files["model.safetensors"]))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    params: dict[str, Any] = {
        "dim": 32,
        "n_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 1,
        "vocab_size": 263,
        "hidden_dim": 32,
    }
    params |= {"norm_eps": 1e-5, "rope_theta": 10000.0, "use_scaled_rope": True, "multiple_of": 32}
    literals = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "unk_token": None}
    return {
        "model.safetensors.index.json": {
            "model.safetensors.index.json": json_bytes(index),
            shard: files["model.safetensors"],
            **{name: data for name, data in files.items() if name != "model.safetensors"},
        },
        "params.json": {"params.json": json_bytes(params)}
        | {name: data for name, data in files.items() if name != "config.json"},
        "special_tokens_map.json": files | {"special_tokens_map.json": json_bytes(literals)},
        "added_tokens.json": files | {"added_tokens.json": json_bytes({"<x>": 263, "<|y|>": 264})},
        "chat_template.json": {"chat_template.json": json_bytes({"chat_template": CHATML})}
        | {name: data for name, data in files.items() if name != "tokenizer_config.json"},
    }
