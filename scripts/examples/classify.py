"""Classification by log-probabilities: the label that a text makes more probable than it is without the text."""

import llamajax

LABELS = ("good", "bad")
REVIEWS = (
    "I loved every minute of it.",
    "A waste of time and money.",
    "The food was wonderful, and so was the service.",
    "It broke after two days, and nobody answered my calls.",
)

llama = llamajax.load(max_seq_len=512)


def logprob(review: str, label: str) -> float:
    """Of the label's tokens after the review."""
    prompt = llama.tokenizer.encode(f"Review: {review}\nSentiment:")
    text = llama.tokenizer.encode(f"Review: {review}\nSentiment: {label}")
    return sum(token.logprob for token in llama.prompt_logprobs(text)[len(prompt) :] if token)


without = {label: logprob("N/A", label) for label in LABELS}
for review in REVIEWS:
    scores = {label: logprob(review, label) - without[label] for label in LABELS}
    print(f"{max(scores, key=scores.__getitem__)}: {review} ({', '.join(f'{k} {v:+.2f}' for k, v in scores.items())})")

# The next token alone, with its most probable alternatives.
answer = llama.generate("The opposite of hot is", max_new_tokens=1, temperature=0, logprobs=3)
assert answer.logprobs
for token_id, value in answer.logprobs[0].top:
    print(f"{llama.tokenizer.decode([token_id])!r} {value:.2f}")
