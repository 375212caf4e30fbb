"""One request at a time, with the lowest latency: text as it comes, and an answer that is broken off."""

import llamajax

llama = llamajax.load(max_seq_len=512)

for piece in llama.stream([{"role": "user", "content": "Tell me a story about a llama."}], max_new_tokens=40):
    print(piece, end="", flush=True)
print()

stream = llama.stream("The first ten prime numbers are", max_new_tokens=200, temperature=0)
for piece in stream:
    print(piece, end="", flush=True)
    if "11" in stream.completion.text:
        stream.cancel()
print(f"\n[{stream.completion.finish_reason} after {len(stream.completion.token_ids)} tokens]")
