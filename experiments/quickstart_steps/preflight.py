"""What the later steps of the quickstart would refuse, found before the first one trains."""

from functools import partial

import jax

from experiments.quickstart_steps.engines import make_prompts, plan_modes
from experiments.quickstart_steps.predict import fit_windows, heldout_windows
from moejax.core.errors import check
from moejax.data.text import Corpus
from moejax.models.config import DecoderConfig
from moejax.models.decoder import init_decoder
from moejax.predictors.config import PredictConfig
from moejax.predictors.residual import init_residual
from moejax.serving.config import DecodeConfig
from moejax.serving.engine import split_experts


def check_steps(
    model: DecoderConfig, corpus: Corpus, predict: PredictConfig, decode: DecodeConfig
) -> None:
    """Raises `InputError` when prediction or decoding could not run. Cost: no model arrays."""
    layers, experts = model.num_moe_layers, model.moe.router.num_experts
    check(layers >= 2, f"predicting the next layer's experts wants num_layers >= 2, got {layers}")
    lanes = decode.prefetch_lanes
    check(lanes <= experts, f"prefetch_lanes={lanes} exceeds num_experts={experts}")
    heldout_windows(corpus.heldout, predict)
    fit_windows(corpus.train, predict)
    make_prompts(corpus.heldout, max(decode.batch_sizes), decode)
    abstract = jax.eval_shape(partial(init_decoder, cfg=model), jax.random.key(0))
    learned = jax.eval_shape(
        lambda key: init_residual(
            key,
            num_layers=layers,
            d_model=model.d_model,
            num_experts=experts,
            hidden=predict.fit.hidden,
        ),
        jax.random.key(0),
    )
    plan_modes(*split_experts(abstract, model), learned, model, decode)
