"""From measured links to a dispatch."""

import dataclasses
import json

import pytest

from moejax.core.errors import InputError
from moejax.costmodel.advice import Calibration, LayerShape, advise, read_calibration
from moejax.costmodel.links import Link

LAYER = LayerShape(tokens=1024, num_experts=64, top_k=8, d_model=512, d_ff=256)
FREE = Link(alpha_s=0.0, beta_s_per_byte=0.0)


def calibration(outer: Link, inner: Link, product: Link = FREE) -> Calibration:
    levels = {("data",): outer, ("data", "expert"): outer, ("expert",): inner}
    return Calibration(sizes={"data": 2, "expert": 4}, exchange=levels, product=product)


def test_slow_outer_links_want_two_levels_and_equal_ones_want_one():
    slow, fast = Link(alpha_s=0.0, beta_s_per_byte=1e-8), Link(alpha_s=0.0, beta_s_per_byte=1e-10)
    two = advise(calibration(slow, fast), LAYER)
    assert two.choice.levels == (("data",), ("expert",))
    one = advise(calibration(slow, slow), LAYER)
    assert one.choice.levels == (("data", "expert"),)
    assert one.figures()["num_levels"] == 1
    assert one.explain().startswith("levels data+expert of data+expert: ")


def test_long_products_hide_links_in_chunks_and_start_ups_forbid_them():
    link = Link(alpha_s=0.0, beta_s_per_byte=1e-9)
    product = Link(alpha_s=0.0, beta_s_per_byte=5e-12)
    many = advise(calibration(link, link, product), LAYER)
    late = Link(alpha_s=1.0, beta_s_per_byte=1e-9)
    assert many.num_chunks > 1
    assert advise(calibration(late, late, product), LAYER).num_chunks == 1
    assert many.figures()["seconds_by_chunks"][str(many.num_chunks)] == min(
        many.seconds_by_chunks.values()
    )


def test_chunks_divide_the_tokens_and_layers_are_possible():
    link, product = (
        Link(alpha_s=0.0, beta_s_per_byte=1e-9),
        Link(alpha_s=0.0, beta_s_per_byte=5e-12),
    )
    odd = dataclasses.replace(LAYER, tokens=1025)
    assert list(advise(calibration(link, link, product), odd).seconds_by_chunks) == [1]
    with pytest.raises(InputError, match="top_k=65 exceeds num_experts=64"):
        dataclasses.replace(LAYER, top_k=65)


def test_reads_what_calibrate_writes_and_nothing_else(tmp_path):
    names = ["all_to_all.data", "all_to_all.data+expert", "all_to_all.expert", "product"]
    figures = {
        "alpha_s": dict.fromkeys(names, 1e-5),
        "beta_s_per_byte": dict.fromkeys(names, 1e-9),
        "sizes": {"data": 2, "expert": 4},
    }
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"figures": figures}))
    link = Link(alpha_s=1e-5, beta_s_per_byte=1e-9)
    assert read_calibration(path) == calibration(link, link, link)
    for text in ("", "[]", "{}", '{"figures": {"alpha_s": {}, "beta_s_per_byte": {}}}'):
        path.write_text(text)
        with pytest.raises(InputError, match=r"calibration.json is not the output"):
            read_calibration(path)
    figures["alpha_s"]["product"] = float("nan")
    path.write_text(json.dumps({"figures": figures}))
    with pytest.raises(InputError, match="product costs alpha=nan"):
        read_calibration(path)
    with pytest.raises(InputError, match="cannot read calibration .*: No such file"):
        read_calibration(tmp_path / "absent")
