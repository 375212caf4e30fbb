"""Where an answer ends: at a string, at a token, or where your own condition holds."""

import llamajax

llama = llamajax.load(max_seq_len=512)
prompt = "Once upon a time there was a llama. It"

# At a string, which is not part of the answer.
print(llama.generate(prompt, max_new_tokens=100, temperature=0, stop=[".", "!"]).text)

# At a token.
newline = llama.tokenizer.encode("\n")
print(llama.generate(prompt, max_new_tokens=100, temperature=0, stop_token_ids=newline).finish_reason)

# At a condition: after the second sentence, or when a word comes for the tenth time.
stream = llama.stream(prompt, max_new_tokens=200, temperature=0)
for _ in stream:
    text = stream.completion.text
    if text.count(".") >= 2 or max(map(text.split().count, text.split()), default=0) >= 10:
        stream.cancel()
print(f"{stream.completion.text} [{stream.completion.finish_reason}]")
