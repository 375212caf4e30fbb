"""What a program asks the host while it runs."""

from threading import Event

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Bool, Float32, Int32

from llamajax.ops import native
from llamajax.types import mask_len

from ... import tiny_model

strict_promotion = tiny_model.strict_promotion

pytestmark = pytest.mark.skipif(
    not native.available() or jax.default_backend() != "cpu", reason="no native kernels here"
)


@jax.jit
def masked(
    number: Int32[Array, "1"], token: Int32[Array, "1"], logits: Float32[Array, "1 V"]
) -> tuple[Float32[Array, "1 V"], Bool[Array, "1"]]:
    token = native.begin_to_ask(number, token, logits.shape[1])
    return native.ask(number, logits + token[:, None].astype(jnp.float32))


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 257])
def test_what_may_not_follow_gets_minus_infinity(vocab_size: int) -> None:
    rng, tokens = np.random.default_rng(vocab_size), list[int]()
    mask, logits = rng.bytes(4 * mask_len(vocab_size)), rng.standard_normal((1, vocab_size), np.float32)

    def answer(token: int) -> bytes:
        tokens.append(token)
        return mask

    with native.asked(answer) as number:
        allowed, ended = masked(number, np.array([7], np.int32), logits)
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[:vocab_size]
    np.testing.assert_array_equal(allowed, np.where(bits, logits + 7, -np.inf))
    assert (tokens, ended.tolist()) == ([7], [False])


def test_without_an_answer_all_has_ended() -> None:
    question = np.zeros(1, np.int32), np.zeros((1, 40), np.float32)
    with native.asked(lambda token: None) as number:
        assert masked(number, *question)[1].tolist() == [True]
    assert masked(number, *question)[1].tolist() == [True]  # nobody is there any more


def test_the_answer_is_looked_for_while_the_program_computes() -> None:
    begun = Event()

    def answer(token: int) -> bytes:
        begun.set()
        return bytes(4)

    @jax.jit
    def program(number: Int32[Array, "1"], token: Int32[Array, "1"]) -> Float32[Array, "1 1"]:
        token = native.begin_to_ask(number, token, 1)
        wait = jax.ShapeDtypeStruct((1, 1), jnp.float32)
        logits = jax.pure_callback(lambda token: np.full((1, 1), begun.wait(20), np.float32), wait, token)
        allowed, _ = native.ask(number, logits)
        return logits + jnp.maximum(allowed, 0)

    with native.asked(answer) as number:
        assert program(number, np.zeros(1, np.int32)).tolist() == [[1]]


def test_questions_of_programs_that_fail_before_they_use_the_mask_are_forgotten() -> None:
    begin = jax.jit(lambda number: native.begin_to_ask(number, jnp.zeros(1, jnp.int32), 40))
    ask = jax.jit(lambda number: native.ask(number, jnp.zeros((1, 40)))[1])
    numbers = []
    for _ in range(65):
        with native.asked(lambda token: None) as number:
            begin(number).block_until_ready()
            numbers.append(number)
    assert ask(numbers[1]).tolist() == ask(numbers[64]).tolist() == [True]
    with pytest.raises(jax.errors.JaxRuntimeError, match="ask"):
        ask(numbers[0]).block_until_ready()
