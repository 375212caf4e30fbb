"""Prompts of any lengths, answered together for the highest speed: in order, as they finish, and beside sequential."""

import time

import llamajax

llama = llamajax.load(max_seq_len=512)

# Prompts of different lengths. Results come in their order; `on_result` has each one as soon as it is there.
prompts = [f"{'Once upon a time, ' * (1 + i % 5)}there were {i} llamas" for i in range(12)]
completions = llama.generate_batch(
    prompts,
    slots=8,
    max_new_tokens=20,
    seed=42,
    raise_errors=True,
    on_result=lambda index, completion: print(f"({index} is there: {len(completion.token_ids)} tokens)"),
)
for prompt, completion in zip(prompts, completions, strict=True):
    print(f"{prompt[-30:]!r} -> {completion.text!r}")

# Each with its own options, from an iterator; results stream in the order in which they finish.
asked = ((prompt, {"max_new_tokens": 5 + i, "seed": i}) for i, prompt in enumerate(prompts[:4]))
for index, result in llama.stream_batch(asked, slots=8):
    print(index, result.text if isinstance(result, llamajax.Completion) else result)

# The same one after the other: the same tokens, in more time.
began = time.perf_counter()
alone = [llama.generate(prompt, max_new_tokens=20, seed=42) for prompt in prompts]
between = time.perf_counter()
together = llama.generate_batch(prompts, slots=8, max_new_tokens=20, seed=42, raise_errors=True)
ended = time.perf_counter()
same = [one.token_ids for one in alone] == [one.token_ids for one in together]
print(f"sequential {between - began:.2f} s, batched {ended - between:.2f} s, same tokens: {same}")
