"""Whether the model is worth predicting: its held-out bits beside n-grams, and its expert load."""

from typing import Any

import numpy as np

from configs.hidden_predictors import HiddenConfig
from experiments.hidden_steps.text import heldout_starts
from moejax.data.text import Corpus
from moejax.data.token_ngram import bits_per_token, fit_token_ngram
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.training.evaluate import evaluate

NGRAMS = ("unigram", "bigram", "trigram")


def score_domains(
    params: DecoderParams, model: DecoderConfig, corpus: Corpus, cfg: HiddenConfig
) -> dict[str, Any]:
    """Bits per token by domain of the model and of n-grams, on the same tokens; expert load.

    N-grams are counted on all training tokens. `load_max_over_mean` is the busiest expert of each
    layer over the layer's mean, on the tokens of all domains.
    """
    counts = fit_token_ngram(corpus.train.data, len(NGRAMS), vocab_size=model.vocab_size)
    bits: dict[str, dict[str, float]] = {}
    scored: dict[str, int] = {}
    load = np.zeros((model.num_moe_layers, model.moe.num_experts), np.int64)
    window = cfg.window
    all_starts = heldout_starts(corpus.heldout, cfg.score_tokens, window, cfg.seed)
    for domain, starts in all_starts.items():
        own, one = evaluate(
            params,
            corpus.heldout.data,
            starts,
            model,
            seq_len=window,
            batch_size=cfg.record_batch,
        )
        positions = (starts[:, None] + np.arange(1, window + 1)).ravel()
        others = bits_per_token(counts, corpus.heldout.data, positions)
        bits[domain] = {"model": own, **dict(zip(NGRAMS, others, strict=True))}
        scored[domain] = len(positions)
        load += one
    return {
        "bits_per_token": bits,
        "scored_tokens": scored,
        "load_max_over_mean": (load.max(1) / load.mean(1)).tolist(),
        "experts_never_used": int((load == 0).sum()),
    }
