"""Makes the reference arrays in tests/parity/data with Hugging Face transformers, in float32 on the CPU.

    pip install '.[dev]' torch transformers
    python -m scripts.make_goldens SmolLM2-135M-Instruct.Q4_1.gguf

goldens.npz: logits of the tiny checkpoints of tests/parity/tiny.py, RoPE tables of the named configurations, and the
default model's losses on text.txt; continuations.json: its greedy continuations of prompts. Both are of its
dequantized weights.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llamajax.tokenizers.gguf import from_gguf
from llamajax.weights.gguf import read_gguf
from tests.parity.tiny import CASES, DATA, WINDOW, prompt, state_dict

# RoPE of the published models: what their config.json says of it.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPE = {
    "llama3.2-1b": (64, {**_LLAMA3, "factor": 32.0}),
    "llama3.2-3b": (128, {**_LLAMA3, "factor": 32.0}),
    "llama3.1-8b": (128, {**_LLAMA3, "factor": 8.0}),
    "llama3-8b": (128, {"rope_type": "default", "rope_theta": 500000.0}),
    "tinyllama-1.1b": (64, {"rope_type": "default", "rope_theta": 10000.0}),
    "smollm2-135m": (64, {"rope_type": "default", "rope_theta": 100000.0}),
    "qwen2.5-0.5b": (64, {"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen2.5-1.5b": (128, {"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen3-0.6b": (128, {"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen3-1.7b": (128, {"rope_type": "default", "rope_theta": 1000000.0}),
    "smollm3-3b": (128, {"rope_type": "default", "rope_theta": 5000000.0}),
    "mistral-7b": (128, {"rope_type": "default", "rope_theta": 1000000.0}),
}
ROPE_POSITIONS = [0, 1, 2, 17, 255, 1000, 4095, 8191]

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "The three primary colors are",
    "Water boils at",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "Photosynthesis is the process by which",
    "<|im_start|>user\nWhat is the tallest mountain on Earth?<|im_end|>\n<|im_start|>assistant\n",
    "import numpy as np\n\nx = np.",
    "In the year 1969,",
    "To make a good cup of tea, first",
    "The mitochondria is",
    "Roses are red,",
    "SELECT name, age FROM users WHERE",
    "The difference between a virus and a bacterium is that",
    "La vie est",
    "A haiku about winter:\n",
    "If all cats are mammals and all mammals are animals, then",
    "Isaac Newton was born",
]
NEW_TOKENS = 40
TIE = 1e-3  # logits no further apart may come out in either order


def main() -> None:
    arrays = {}
    for case, hf in CASES.items():
        model = _tiny_model(case, hf)
        with torch.inference_mode():
            arrays[f"{case}/logits"] = model(torch.tensor([prompt(case)])).logits[0].numpy()
        rope = model.model.rotary_emb
        arrays[f"{case}/inv_freq"], arrays[f"{case}/factor"] = rope.inv_freq.numpy(), np.array(rope.attention_scaling)
    positions = torch.tensor([ROPE_POSITIONS])
    for name, (head_dim, parameters) in ROPE.items():
        config = LlamaConfig(head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=131072)
        rope = LlamaRotaryEmbedding(config)
        cos, sin = rope(torch.zeros(1), positions)
        arrays[f"rope/{name}/inv_freq"] = rope.inv_freq.numpy()
        arrays[f"rope/{name}/cos"] = cos[0, :, : head_dim // 2].numpy()
        arrays[f"rope/{name}/sin"] = sin[0, :, : head_dim // 2].numpy()
    arrays["rope/positions"] = np.array(ROPE_POSITIONS)

    path = Path(sys.argv[1])
    model = _default_model(path)
    tokenizer = from_gguf(read_gguf(path).metadata)
    ids = tokenizer.encode((DATA / "text.txt").read_text(encoding="utf-8"))
    arrays["default/losses"] = _losses(model, ids)
    np.savez_compressed(DATA / "goldens.npz", **arrays)
    continuations = [{"prompt": text} | _continue(model, tokenizer.encode(text)) for text in PROMPTS]
    (DATA / "continuations.json").write_text("[\n" + ",\n".join(map(json.dumps, continuations)) + "\n]\n")


def _tiny_model(case: str, hf: dict[str, Any]) -> PreTrainedModel:
    options = {key: value for key, value in hf.items() if key not in ("model_type", "architectures", "torch_dtype")}
    config = AutoConfig.for_model(hf["model_type"], **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return _load(model, state_dict(case))


def _default_model(path: Path) -> PreTrainedModel:
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
    heads = {"q": fields["llama.attention.head_count"], "k": fields["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.removesuffix(".weight").split(".")[-1]
        if kind in ("attn_q", "attn_k"):
            array = array.reshape(heads[kind[-1]], -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        weights[_hf_name(tensor.name)] = array
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(weights["model.embed_tokens.weight"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads["q"],
        num_key_value_heads=heads["k"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings="lm_head.weight" not in weights,
    )
    return _load(AutoModelForCausalLM.from_config(config, dtype=torch.float32), weights)


def _hf_name(name: str) -> str:
    for old, new in (
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("blk", "model.layers"),
        ("attn_norm", "input_layernorm"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        *((f"attn_{x}", f"self_attn.{x}_proj") for x in "qkv"),
        *((f"ffn_{x}", f"mlp.{x}_proj") for x in ("gate", "up", "down")),
    ):
        name = name.replace(old, new)
    return name


def _load(model: PreTrainedModel, weights: dict[str, np.ndarray]) -> PreTrainedModel:
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    return model.eval()


@torch.inference_mode()
def _continue(model: PreTrainedModel, ids: list[int]) -> dict[str, Any]:
    """The greedy continuation, by how much each token beat the second best, and ties: steps and second-best tokens."""
    tokens: list[int] = []
    gaps: list[float] = []
    ties: list[tuple[int, int]] = []
    cache, new = None, ids
    for step in range(NEW_TOKENS):
        output = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        best = output.logits[0, -1].topk(2)
        gap = (best.values[0] - best.values[1]).item()
        token, second = best.indices.tolist()
        if gap < TIE:
            ties.append((step, second))
        gaps.append(round(gap, 4))
        tokens.append(token)
        new = [token]
    return {"token_ids": tokens, "gaps": gaps, "ties": ties}


@torch.inference_mode()
def _losses(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """Negative log-probabilities of each window's tokens but the first; windows know nothing of each other."""
    losses = []
    for begin in range(0, len(ids), WINDOW):
        window = torch.tensor(ids[begin : begin + WINDOW])
        scores = model(window[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(scores, window[1:], reduction="none"))
    return torch.cat(losses).numpy()


if __name__ == "__main__":
    main()
