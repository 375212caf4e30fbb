"""What sampling means, in float64: vLLM's order, by sorting and running sums."""

import numpy as np

from llamajax.types import SamplingParams


def reference_probs(
    logits: np.ndarray,
    params: SamplingParams,
    prompt_mask: np.ndarray | None = None,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """Probabilities [V] with which a row's next token is drawn: bias, penalties, temperature, min-p, top-k, top-p."""
    scores = logits.astype(np.float64)
    for token_id, added in (params.logit_bias or {}).items():
        scores[token_id] += added
    counts = np.zeros(scores.shape, int) if counts is None else counts
    seen = (counts > 0) if prompt_mask is None else prompt_mask | (counts > 0)
    repeated = np.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    scores = np.where(seen, repeated, scores)
    scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    if params.temperature == 0:
        return np.eye(len(scores))[scores.argmax()]
    scores = scores / params.temperature
    # Most probable first; of equal ones the lowest id first.
    order = np.argsort(-scores, kind="stable")
    probs = np.exp(scores[order] - scores[order[0]])
    probs[probs < params.min_p] = 0
    if params.top_k:
        probs[params.top_k :] = 0
    probs /= probs.sum()
    mass_before = np.concatenate([[0], np.cumsum(probs)[:-1]])
    if params.top_p < 1:
        probs[mass_before >= params.top_p] = 0
    result = np.zeros_like(probs)
    result[order] = probs / probs.sum()
    return result
