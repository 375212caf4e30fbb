"""Many prompts of any lengths, answered together for the highest throughput; results in their order."""

import llamajax

llama = llamajax.load(max_seq_len=512)

prompts = [f"{'Once upon a time, ' * (1 + i % 5)}there were {i} llamas" for i in range(12)]
completions = llamajax.generate_batch(
    llama,
    prompts,
    max_new_tokens=20,
    temperature=0.7,
    top_p=0.9,
    seed=42,
    raise_errors=True,
    on_result=lambda index, completion: print(f"({index} is there: {len(completion.token_ids)} tokens)"),
)
for prompt, completion in zip(prompts, completions, strict=True):
    print(f"{prompt[-30:]!r} -> {completion.text!r}")
