"""The kinds of fitted predictors: what determines the shapes of each, and how it is made anew."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from moejax.predictors.history import HistoryParams, init_history
from moejax.predictors.llapor import LlaporConfig, LlaporParams, init_llapor, layer_groups
from moejax.predictors.path import PathParams, init_path
from moejax.predictors.pca import Compression
from moejax.predictors.pre_attention import PreAttentionParams, init_pre_attention
from moejax.predictors.residual import ResidualParams, init_residual

Predictor: TypeAlias = (
    ResidualParams | HistoryParams | LlaporParams | PathParams | PreAttentionParams
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of parameters, its sizes, and (key, **sizes) -> parameters."""

    params: type
    sizes: Callable[[Any], dict[str, int]]
    init: Callable[..., Predictor]

    @property
    def names(self) -> set[str]:
        """What `sizes` says and `init` takes."""
        return set(inspect.signature(self.init).parameters) - {"key"}


def _residual_sizes(params: ResidualParams) -> dict[str, int]:
    targets, d_model, hidden = params.net.w_in.shape
    sizes = {"num_layers": targets + 1, "d_model": d_model, "hidden": hidden}
    return sizes | {"num_experts": params.net.w_out.shape[-1]}


def _history_sizes(params: HistoryParams) -> dict[str, int]:
    num_layers, num_experts = params.popularity.shape
    vocab_size, embedding = params.net.embedding.shape
    return {
        "num_layers": num_layers,
        "num_experts": num_experts,
        "vocab_size": vocab_size,
        "embedding": embedding,
        "hidden": params.net.reader.w_in.shape[-1],
        "horizons": params.horizons,
    }


def _init_history(
    key: jax.Array,
    *,
    num_layers: int,
    num_experts: int,
    vocab_size: int,
    embedding: int,
    hidden: int,
    horizons: int,
) -> HistoryParams:
    sizes = dict(vocab_size=vocab_size, embedding=embedding, hidden=hidden, horizons=horizons)
    return init_history(key, jnp.zeros((num_layers, num_experts)), **sizes)


def _llapor_sizes(params: LlaporParams) -> dict[str, int]:
    edge, middle = params.edge, params.middle
    return {
        "num_layers": len(edge.w_in) + len(middle.w_in) + 1,
        "d_model": params.edge_inputs.mean.shape[1],
        "num_experts": edge.b_out.shape[-1],
        "edge_components": edge.w_in.shape[1],
        "middle_components": middle.w_in.shape[1],
        "edge_hidden": edge.w_in.shape[2],
        "middle_hidden": middle.w_in.shape[2],
    }


def _init_llapor(
    key: jax.Array,
    *,
    num_layers: int,
    d_model: int,
    num_experts: int,
    edge_components: int,
    middle_components: int,
    edge_hidden: int,
    middle_hidden: int,
) -> LlaporParams:
    middle = len(layer_groups(num_layers)["middle"])

    def compression(layers: int, components: int) -> Compression:
        mean = jnp.zeros((layers, d_model))
        return Compression(mean=mean, basis=jnp.zeros((layers, d_model, components)))

    sizes = LlaporConfig(
        edge_components=edge_components,
        middle_components=middle_components,
        edge_hidden=edge_hidden,
        middle_hidden=middle_hidden,
    )
    edge = compression(num_layers - 1 - middle, edge_components)
    deep = compression(middle, middle_components)
    return init_llapor(key, edge, deep, sizes, num_experts=num_experts)


def _path_sizes(params: PathParams) -> dict[str, int]:
    encoder = params.encoder
    filters, context, embedding = encoder.filters.shape
    num_layers, hidden, num_experts = params.w_out.shape
    return {
        "num_layers": num_layers,
        "num_experts": num_experts,
        "vocab_size": encoder.embedding.shape[0],
        "embedding": embedding,
        "hidden": hidden,
        "context": context,
        "filters": filters,
    }


def _pre_attention_sizes(params: PreAttentionParams) -> dict[str, int]:
    num_layers, d_model, hidden = params.w_in.shape
    sizes = {"num_layers": num_layers, "d_model": d_model, "hidden": hidden}
    return sizes | {"num_experts": params.w_out.shape[-1]}


KINDS = {
    "residual": Kind(ResidualParams, _residual_sizes, init_residual),
    "history": Kind(HistoryParams, _history_sizes, _init_history),
    "llapor": Kind(LlaporParams, _llapor_sizes, _init_llapor),
    "path": Kind(PathParams, _path_sizes, init_path),
    "pre_attention": Kind(PreAttentionParams, _pre_attention_sizes, init_pre_attention),
}
