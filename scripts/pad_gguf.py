"""The default model with rows of a multiple of 256 numbers, for formats that need them, such as q4_k.

    pip install gguf
    python -m scripts.pad_gguf padded.gguf

The model grows by zeros: its hidden size from 576 to 768, its heads from 9 to 12. So it computes the same function.
An RMS norm divides by a mean, in which the zeros count: its weights and its epsilon make up for that. Weights are in
float32.
"""

import argparse

import gguf
import numpy as np

from llamajax import hub

GROWN = {576: 768, 192: 256}  # numbers of the hidden state and of all heads' queries; of all heads' keys
SHARE = 576 / 768
VALUES = {
    "llama.embedding_length": 768,
    "llama.attention.head_count": 12,
    "llama.attention.head_count_kv": 4,
}
EPSILON = "llama.attention.layer_norm_rms_epsilon"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    source = gguf.GGUFReader(hub.resolve(hub.DEFAULT))
    writer = gguf.GGUFWriter(parser.parse_args().path, "llama")
    for name, field in source.fields.items():
        value = VALUES.get(name, field.contents()) * (SHARE if name == EPSILON else 1)
        if isinstance(value, list):
            writer.add_array(name, value)
        elif not name.startswith("GGUF.") and name != "general.architecture":  # the writer adds these
            writer.add_key_value(name, value, field.types[0])
    for tensor in source.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type) * (SHARE**0.5 if "norm" in tensor.name else 1)
        zeros = [(0, GROWN.get(size, size) - size) for size in weight.shape]
        writer.add_tensor(tensor.name, np.pad(weight, zeros).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
