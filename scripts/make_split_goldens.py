"""Makes tests/parity/data/splits.npz: token ids by llama.cpp for each split of byte-level vocabularies.

    pip install gguf hypothesis llama-cpp-python platformdirs pytest tokenizers
    python -m scripts.make_split_goldens

The vocabulary's merges are learned across words, from the lines themselves, so that ids differ where splits do. The
file has the merges, and for each split the ids of all lines in a row and how many each line has.
"""

import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llamajax.tokenizers.splits import SPLITS
from tests.parity import splits

VOCAB_SIZE = 6000


def main() -> None:
    lines = splits.lines()
    merges = _learned_merges(lines)
    arrays = {"merges": np.array(merges)}
    known: dict[object, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, split in SPLITS.items():
            # Names that share a split share its ids. To see whether llama.cpp agrees, each is asked.
            ids = _llamacpp_ids(Path(folder, "x.gguf"), name, merges, lines)
            first = known.setdefault(split, name)
            flat = np.array([i for line in ids for i in line], np.uint16)
            if name == first:
                arrays[f"{name}/ids"], arrays[f"{name}/lengths"] = flat, np.array(list(map(len, ids)), np.uint16)
            elif not np.array_equal(flat, arrays[f"{first}/ids"]):
                sys.exit(f"llama.cpp splits {name} and {first} differently")
            print(name, len(flat))
    np.savez_compressed(splits.PATH, **arrays)


def _learned_merges(lines: list[str]) -> list[str]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.model.save(folder := tempfile.mkdtemp())
    return Path(folder, "merges.txt").read_text("utf-8").splitlines()[1:]


def _llamacpp_ids(path: Path, pre: str, merges: list[str], lines: list[str]) -> list[list[int]]:
    tokens = splits.vocabulary(merges)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(line.encode(), add_bos=False, special=False) for line in lines]


if __name__ == "__main__":
    main()
