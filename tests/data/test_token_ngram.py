"""N-grams of tokens: probabilities by hand, a distribution, unseen contexts, what is refused."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.token_ngram import bits_per_token, fit_token_ngram

DATA = np.array([1, 2, 1, 2, 1, 3], np.uint16)


def test_by_hand():
    model = fit_token_ngram(DATA, 2, vocab_size=4)
    # The last token, 3 after 1. Unigram: 6 tokens of 3 kinds; 1 is followed by 2, 2 and 3.
    uni = (1 + 3 * 0.25) / (6 + 3)
    two = (1 + 2 * uni) / (3 + 2)
    bits = bits_per_token(model, DATA, np.array([5]))
    np.testing.assert_allclose(bits, [-np.log2(uni), -np.log2(two)], rtol=1e-12)


@pytest.mark.parametrize("context", [[1, 2], [2, 1], [3, 3], [0, 0]])
def test_a_distribution_after_every_context(context):
    model = fit_token_ngram(DATA, 3, vocab_size=4)
    bits = [bits_per_token(model, np.array([*context, y]), np.array([2])) for y in range(4)]
    np.testing.assert_allclose((2.0 ** -np.array(bits)).sum(0), 1, rtol=1e-12)


def test_an_unseen_context_leaves_the_lower_order():
    model = fit_token_ngram(DATA, 3, vocab_size=4)
    _, two, three = bits_per_token(model, np.array([3, 1, 2]), np.array([2]))
    assert two == three


def test_longer_contexts_help_on_text_that_repeats():
    rng = np.random.default_rng(0)
    data = np.tile(rng.integers(0, 4096, 500), 20).astype(np.uint16)
    one, two, three = bits_per_token(
        fit_token_ngram(data[:5000], 3, vocab_size=4096), data, np.arange(5000, 10000)
    )
    assert one > 8 and three < two < 1


def test_what_is_refused():
    with pytest.raises(InputError, match="order=4"):
        fit_token_ngram(DATA, 4, vocab_size=4)
    with pytest.raises(InputError, match="token 3 is not below vocab_size=3"):
        fit_token_ngram(DATA, 1, vocab_size=3)
