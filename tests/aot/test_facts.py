import pytest

from moejax.aot.facts import (
    Work,
    count_host_callbacks,
    host_computes,
    overlapped,
    transfers,
    whole_copies,
)
from moejax.aot.hlo import parse_hlo
from tests.aot.snippets import COPIES, HOST, STREAM


def test_transfers_with_bytes_and_positions():
    prefetch, late = transfers(parse_hlo(STREAM))
    assert (prefetch.name, prefetch.direction) == ("fetch-start", "host_to_device")
    assert prefetch.nbytes == 256 * 128 * 2
    assert (prefetch.start, prefetch.done) == (7, 9)
    assert (late.start, late.done) == (10, 11)


def test_work_is_found_by_scope_through_fusions_and_loops():
    module = parse_hlo(STREAM)
    work = Work(module)
    assert work.positions("body") == (8,)
    assert work.positions("body", "moe_experts") == (8,)
    assert work.positions("body", "attention") == ()
    (loop,) = [one for one in module.computations["main"] if one.opcode == "while"]
    assert work.is_matmul(loop, "moe_experts")
    assert not work.is_matmul(loop, "attention")


def test_only_a_transfer_that_spans_the_work_is_overlapped():
    module = parse_hlo(STREAM)
    assert [one.name for one in overlapped(module, transfers(module), "moe_experts")] == [
        "fetch-start"
    ]
    assert overlapped(module, transfers(module), "attention") == ()


def test_a_product_rewritten_as_a_reduction_is_still_work():
    text = STREAM.replace("convolution(%p0, %p1), dim_labels=bf_io->bf", "reduce(%p0, %p1)")
    assert "convolution(" not in text
    assert Work(parse_hlo(text)).positions("body", "moe_experts") == (8,)


def test_whole_copies_are_told_from_updates_in_place():
    copies = whole_copies(parse_hlo(COPIES), (4, 256, 128))
    assert [one.name for one in copies] == ["plain", "start", "turned", "wide", "pair"]
    assert [one.name for one in whole_copies(parse_hlo(COPIES), (256, 128))] == ["small"]


def test_an_update_in_a_loop_copies_nothing():
    assert whole_copies(parse_hlo(STREAM), (4, 256, 128)) == ()
    assert whole_copies(parse_hlo(STREAM), (16, 256, 128)) == ()


def test_host_work_is_counted():
    module = parse_hlo(HOST)
    assert len(host_computes(module)) == 1
    assert count_host_callbacks(module) == 2  # the send to a host handler, and the custom call
    out, back = transfers(module)
    assert (out.direction, out.start, out.done) == ("device_to_host", 1, 2)
    assert (back.direction, back.start, back.done) == ("host_to_device", 5, 5)
    assert Work(module).positions("main") == ()  # what the host multiplies hides nothing
    assert not host_computes(parse_hlo(STREAM))
    assert count_host_callbacks(parse_hlo(STREAM)) == 0


def test_a_start_without_done_is_refused():
    with pytest.raises(ValueError, match="fetch-start has no done in body"):
        transfers(parse_hlo(STREAM.replace("dynamic-slice-done(%fetch-start)", "copy(%fetch)")))
