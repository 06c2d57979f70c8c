"""Gated MLP of every expert over rows sorted by expert."""

from moejax.kernels.grouped_ffn.api import explain as explain
from moejax.kernels.grouped_ffn.api import grouped_ffn as grouped_ffn
from moejax.kernels.grouped_ffn.blocked import run_chunks as run_chunks
from moejax.kernels.grouped_ffn.weights import GatedWeights as GatedWeights
from moejax.kernels.grouped_ffn.weights import hidden_fn as hidden_fn
