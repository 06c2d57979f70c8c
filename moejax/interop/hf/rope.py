"""Rope parameters of a config.json as divisors of frequencies.

    linear   Chen et al., arXiv 2306.15595: all frequencies divided by one factor
    yarn     Peng et al., arXiv 2309.00071, section 3: slow pairs are, fast ones are not, with a
             ramp between; the rotated vector is scaled by 0.1 ln(factor) + 1
    llama3   the same idea with a ramp in wavelengths
    longrope Ding et al., arXiv 2402.13753: a divisor per pair, given in the config

Both spellings of the config are read: `rope_theta` with `rope_scaling`, and `rope_parameters`.
"""

import dataclasses
import math

import numpy as np

from moejax.core.errors import InputError, check
from moejax.interop.hf.fields import Fields
from moejax.layers.rope import RopeConfig


def read_rope(fields: Fields, head_dim: int) -> RopeConfig:
    """The rotation of heads of `head_dim` dims; raises `InputError` for an unknown scaling."""
    scaling = rope_fields(fields)
    theta = scaling.number("rope_theta", default=fields.number("rope_theta", default=10000.0))
    partial = scaling.number(
        "partial_rotary_factor", default=fields.number("partial_rotary_factor", default=1.0)
    )
    dim = int(head_dim * partial)
    base = RopeConfig(theta=theta, dim=0 if dim == head_dim else dim)
    kind = scaling.get("rope_type", "type", default="default")
    if kind == "default":
        return base
    readers = {"linear": _linear, "yarn": _yarn, "llama3": _llama3, "longrope": _longrope}
    if kind not in readers:
        raise InputError(f"rope scaling {kind!r} is not supported, only {', '.join(readers)}")
    frequency = theta ** (-np.arange(0, dim, 2) / dim)
    divisors, magnitude = readers[kind](scaling, fields, frequency)
    given = scaling.get("attention_factor")
    return dataclasses.replace(
        base,
        divisors=tuple(float(d) for d in divisors),
        magnitude=float(magnitude if given is None else given),
    )


def rope_fields(fields: Fields) -> Fields:
    """`rope_parameters`, or the older `rope_scaling`; `InputError` where they contradict."""
    values = fields.get("rope_parameters", "rope_scaling", default={})
    older = fields.get("rope_scaling", default={})
    for one in (values, older):
        check(isinstance(one, dict), f"config.json: rope parameters {one!r} are not an object")
    for name in older.keys() & values.keys():
        check(
            older[name] == values[name],
            f"config.json: {name}={values[name]!r} of rope_parameters is {older[name]!r} "
            "in rope_scaling",
        )
    return Fields(values)


def score_scale(fields: Fields, dims: int) -> float:
    """Of DeepSeek's attention with YaRN: both factors of a score carry the magnitude `mscale`."""
    scaling = rope_fields(fields)
    scale, m = dims**-0.5, scaling.number("mscale_all_dim", default=0.0)
    if scaling.get("rope_type", "type", default="default") == "default" or not m:
        return scale
    return scale * _yarn_magnitude(scaling.number("factor"), m) ** 2


def _linear(scaling, fields, frequency):
    return np.full(frequency.shape, scaling.number("factor")), 1.0


def _yarn(scaling, fields, frequency):
    dim, factor = 2 * len(frequency), scaling.get("factor")
    original = _original(scaling, fields)
    theta = scaling.number("rope_theta", default=fields.number("rope_theta", default=10000.0))
    if factor is None:
        factor = fields.number("max_position_embeddings") / original

    def pair(turns):
        """The (fractional) pair that turns so often over the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair(scaling.number("beta_fast", default=32.0))
    high = pair(scaling.number("beta_slow", default=1.0))
    if scaling.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    slow = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    magnitude = _yarn_magnitude(factor, 1.0)
    if m and m_all:
        magnitude = _yarn_magnitude(factor, m) / _yarn_magnitude(factor, m_all)
    return 1 / (slow / factor + (1 - slow)), magnitude


def _yarn_magnitude(factor, mscale):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(scaling, fields, frequency):
    factor, original = scaling.number("factor"), _original(scaling, fields)
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    turns = original * frequency / (2 * math.pi)  # over the original context
    fast = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (fast + (1 - fast) / factor), 1.0


def _longrope(scaling, fields, frequency):
    """The short factors: contexts up to the original length, see `context_of`."""
    factors = scaling.get("short_factor")
    check(
        isinstance(factors, list) and len(factors) == len(frequency),
        f"longrope wants a short_factor of {len(frequency)} numbers",
    )
    given = scaling.get("short_mscale")
    if given is not None:
        return factors, given
    original = _original(scaling, fields)
    factor = scaling.get("factor", default=fields.integer("max_position_embeddings") / original)
    return factors, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _original(scaling, fields):
    return scaling.number(
        "original_max_position_embeddings",
        default=fields.number("original_max_position_embeddings", "max_position_embeddings"),
    )


def context_of(fields: Fields) -> int:
    """Positions that the model can be run at: the original ones where longrope stretches them."""
    scaling = rope_fields(fields)
    if scaling.get("rope_type", "type") == "longrope":
        return int(_original(scaling, fields))
    return fields.integer("max_position_embeddings")
