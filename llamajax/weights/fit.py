"""Whether stored tensors are the weights that a configuration asks for, no fewer and no others."""

import logging
import re
from collections.abc import Mapping, Sequence

from llamajax.errors import CheckpointError
from llamajax.formats import DENSE_DTYPES, FORMATS
from llamajax.text import one_line
from llamajax.weights.names import Source, embedding_and_head
from llamajax.weights.tensor import StoredTensor

# Most tensors that a message names: of a wrong file, hundreds do not fit.
_NAMED = 8

# Tensors that other tools save beside the weights, and that no model here needs: constants of RoPE, which follow from
# the configuration; scales of 8-bit caches and attention, which have 16 bits here; masks.
_BUFFER = re.compile(
    r"(.*\.)?rotary_emb\.[^.]+"
    r"|.*\.(self_)?attn\.(masked_bias|[qkv]_scale|kv_scale|prob_scale)"
    r"|.*\.[kv]_proj\.([kv]_scale|output_scale)"
)
_MASK = re.compile(r".*\.(self_)?attn\.bias")
_INTEGERS = re.compile(r"bool|[iu]\d+")
# Frequencies of RoPE: a GGUF's are read elsewhere, and Meta's follow from params.json.
_ROPE_FREQUENCIES = ("rope_freqs.weight", "rope.freqs")


def check_fit(plan: Mapping[str, list[Source]], tensors: Mapping[str, StoredTensor]) -> None:
    """Raises CheckpointError naming all missing, unexpected, misshapen and unreadable tensors.

    Buffers that are no weights, such as masks and integers, are logged as ignored.
    """
    expected = {source.name: source.shape for parts in plan.values() for source in parts}
    # A tied model's file may repeat the embedding as its head.
    known = {*expected, *_ROPE_FREQUENCIES, *embedding_and_head(tensors)}
    extra = [tensor for name, tensor in tensors.items() if name not in known]
    ignored = [tensor.name for tensor in extra if _is_buffer(tensor)]
    found = [tensors[name] for name in expected if name in tensors]
    problems = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in tensors],
        "unexpected": [f"{tensor.name} {tensor.shape}" for tensor in extra if tensor.name not in ignored],
        "misshapen": [
            f"{tensor.name} {tensor.shape}, expected {expected[tensor.name]}"
            for tensor in found
            if tensor.shape != expected[tensor.name]
        ],
        "unreadable, expected F32, F16, BF16 or F64": [
            f"{tensor.name} {tensor.format.upper()}" for tensor in found if not _is_readable(tensor)
        ],
    }
    if any(problems.values()):
        raise CheckpointError(
            "the weights do not fit the configuration: "
            + "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in problems.items() if names)
        )
    if ignored:
        logging.getLogger("llamajax").warning(
            "ignoring %d tensors that are no weights: %s", len(ignored), _listed(ignored)
        )


def _is_buffer(tensor: StoredTensor) -> bool:
    is_mask = len(tensor.shape) == 4 and _MASK.fullmatch(tensor.name)
    return bool(is_mask or _BUFFER.fullmatch(tensor.name) or _INTEGERS.fullmatch(tensor.format))


def _is_readable(tensor: StoredTensor) -> bool:
    return tensor.format in DENSE_DTYPES or tensor.format in FORMATS


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(one_line(name, longest=150) for name in names[:_NAMED]) + more
