import pathlib
import re

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.route_csv import read_route_csv

TRACES = pathlib.Path(__file__).parent / "traces"
GOOD = """\
# route_trace v1
# model=/models/toy model.gguf arch=toy n_layer=3 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=0 dense_bytes=7
# layer=1 expert_bytes=100 dense_bytes=7
# layer=2 expert_bytes=300 dense_bytes=7
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,1,0,3,0.75,0,100
0,0,0,1,1,0,0.25,0,100
0,0,1,1,0,0,0.5,0,0
0,0,1,1,1,2,0.5,0,100
0,0,1,2,0,1,1e0,0,300
0,0,1,2,1,2,0,0,300
0,1,2,1,0,0,0.5,1,0
0,1,2,1,1,1,0.5,0,100
0,1,2,2,0,2,0.5,2,0
0,1,2,2,1,0,0.5,0,300
"""


def write(tmp_path, text):
    path = tmp_path / "t.route.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_reads_every_cell(tmp_path):
    recorded = read_route_csv(write(tmp_path, GOOD))
    trace = recorded.trace
    assert trace.topk_idx.tolist() == [[[3, 0], [0, 2], [0, 1]], [[4, 4], [1, 2], [2, 0]]]
    assert trace.topk_weights.tolist()[1] == [[0, 0], [1, 0], [0.5, 0.5]]
    assert trace.expert_bytes.tolist() == [100, 300] and trace.num_experts == 4
    assert trace.sequence_lengths.tolist() == [3] and trace.prompt_lengths.tolist() == [2]
    assert recorded.residency.tolist() == [[[0, 0], [0, 0], [1, 0]], [[-1, -1], [0, 0], [2, 0]]]
    assert recorded.bytes_read.sum() == 1300 and recorded.bytes_read[0, 1].tolist() == [0, 100]
    assert trace.meta == {
        "model": "toy model",
        "arch": "toy",
        "layers": [1, 2],
        "source": "route_trace v1",
    }


def test_a_second_turn_is_a_second_sequence_and_nan_weights_are_none(tmp_path):
    header, _, rows = GOOD.partition("expert_bytes\n0,")
    rows = "0," + rows
    turn = "\n".join("1" + row[1:] for row in rows.splitlines()) + "\n"
    text = header + "expert_bytes\n" + rows + turn
    trace = read_route_csv(write(tmp_path, text)).trace
    assert trace.sequence_lengths.tolist() == [3, 3] and trace.prompt_lengths.tolist() == [2, 2]
    np.testing.assert_array_equal(trace.topk_idx[:, :3], trace.topk_idx[:, 3:])
    unknown = re.sub(r"^((?:\d+,){6})[^,]+", r"\1nan", text, flags=re.MULTILINE)
    assert read_route_csv(write(tmp_path, unknown)).trace.topk_weights is None


def test_a_dropped_column_of_zeros_is_accepted(tmp_path):
    lines = GOOD.splitlines()
    text = "\n".join(lines[:5] + [lines[5] + ",dropped"] + [row + ",0" for row in lines[6:]])
    assert read_route_csv(write(tmp_path, text + "\n")).trace.num_tokens == 3
    with pytest.raises(InputError, match=r":16: dropped='1'"):
        read_route_csv(write(tmp_path, text[:-1] + "1\n"))


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        ("0,0,0,1,0,3,0.75,0,100", "0,0,0,1,0,3,0.75,0", 7, "8 columns, expected 9"),
        ("0,0,0,1,0,3,0.75,0,100", "0,0,0,1,0,3,0.75,0,100,0,0", 7, "11 columns, expected 9"),
        ("0,0,0,1,0,3,0.75,0,100", "", 7, "1 columns, expected 9"),
        ("0,0,0,1,0,3,0.75", "0,0,0,1,0,x,0.75", 7, "expert='x' is not a non-negative integer"),
        ("0,0,0,1,0,3,0.75", "0,0,0,1,0,3.0,0.75", 7, "expert='3.0' is not a non-negative int"),
        ("0,0,0,1,0,3,0.75", "0,0,-1,1,0,3,0.75", 7, "step='-1' is not a non-negative integer"),
        ("0,0,0,1,0,3,0.75", "0,0,0,1,0,3,-0.75", 7, "weight='-0.75' is not a non-negative num"),
        ("0,0,0,1,0,3,0.75", "0,0,0,1,0,3,inf", 7, "weight='inf' is not"),
        ("0,0,0,1,0,3,0.75", "0,0,0,1,0,3,1e99", 7, "weight overflows"),
        ("0,0,1,1,0,0,0.5", "0,0,1,1,0,0,nan", 9, "weight is nan in some rows only"),
        ("0,0,0,1,0,3,0.75", "0,0,0,1,0,9" + "9" * 30 + ",0.75", 7, "expert='9999"),
        ("0,0,0,1,0,3,", "0,0,0,1,0,4,", 7, "expert=4 >= n_expert=4"),
        ("0,1,2,2,1,0,", "0,1,2,3,1,0,", 16, "layer=3 >= 3"),
        ("0,1,2,2,1,0,", "0,1,2,0,1,0,", 16, "layer=0 has no expert_bytes"),
        ("0,1,2,2,1,0,", "0,1,2,2,2,0,", 16, "slot=2 >= n_expert_used=2"),
        ("0,1,2,2,1,0,", "0,1,2,2,0,0,", 16, "slot=0 appears twice"),
        ("0,1,2,2,1,0,", "0,1,2,2,1,2,", 16, "expert=2 was chosen twice"),
        ("0,1,2,2,1,0,", "0,2,2,2,1,0,", 16, "phase=2, expected 0"),
        ("0.5,0,300", "0.5,3,300", 16, "residency=3, expected"),
        ("0.5,0,300", "0.5,0,30", 16, "expert_bytes=30 is not the layer's"),
        ("0.5,0,300", "0.5,1,300", 16, "bytes read although residency=1"),
        ("0,0,1,1,1,2,0.5,0,100\n", "", 9, "step 1, layer 1 has 1 of 2 slots"),
        ("\n0,1,2,", "\n0,1,4,", 13, "turn 0, step 4 follows step 1"),
        ("turn,phase", "phase,turn", 6, "expected the header turn,phase,step"),
        ("turn,phase", "0,0\nturn,phase", 6, "expected the header"),
        ("# layer=2", "# layer=1", 5, "layer 1 is listed twice"),
        ("# layer=2", "# lair=2", 5, "neither a model nor a layer line"),
        ("# route_trace v1", "# route_trace v2", 1, "expected '# route_trace v1'"),
        ("0,0,0,1,0,3,0.75", "0,0,0,1,0,\u0663,0.75", 7, "expert='\u0663' is not"),
    ],
)
def test_a_corrupt_row_is_named(tmp_path, old, new, line, reason):
    text = GOOD.replace(old, new)
    assert text != GOOD
    with pytest.raises(InputError) as error:
        read_route_csv(write(tmp_path, text))
    assert str(error.value).startswith(f"{tmp_path / 't.route.csv'}:{line}: {reason}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\x89PNG\r\n", ":1: byte 0x89 is not UTF-8"),
        (GOOD.encode().replace(b"0.75", b"0.7\xff"), ":7: byte 0xff is not UTF-8"),
        (GOOD[:-1].encode(), ":16: no newline at the end: the file is truncated"),
        (GOOD[: GOOD.index("0,1,2,2")].encode(), "decode step 2 has 2 of 4 rows: the file is cut"),
        (GOOD[: GOOD.index("0,0,0,1")].encode(), "no rows after the header"),
        (GOOD[: GOOD.index("turn")].encode(), ":6: expected the header"),
        (b"# route_trace v1\nturn,phase\n", "the preamble has no '# model="),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, reason):
    with pytest.raises(InputError, match=f"t.route.csv.*{reason}"):
        read_route_csv(write(tmp_path, content))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match="nothing.csv: No such file"):
        read_route_csv(tmp_path / "nothing.csv")
    with pytest.raises(InputError, match="Is a directory"):
        read_route_csv(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "prompt", "absent", "residency_0", "with_bytes"),
    [
        ("qwen", (48, 156, 6), 28, 27 * 6, 15169, 9929),
        ("gemma", (30, 157, 6), 29, 0, 9388, 5706),
        ("gptoss", (36, 149, 2), 85, 84 * 2, 8494, 4309),
    ],
)
def test_real_traces(name, shape, prompt, absent, residency_0, with_bytes):
    recorded = read_route_csv(TRACES / f"{name}.route.csv")
    trace = recorded.trace
    assert trace.topk_idx.shape == shape and trace.num_experts == 128
    assert trace.prompt_lengths.tolist() == [prompt]
    assert (~trace.present).sum() == absent
    # The last layer of the prompt saw its last token only, not its first.
    assert trace.present[-1, prompt - 1].all()
    assert (recorded.residency == 0).sum() == residency_0
    assert (recorded.bytes_read > 0).sum() == with_bytes
    order = np.diff(trace.topk_weights, axis=-1)[trace.present[..., 0]]
    assert (order <= 0).mean() > 0.99  # slots are ranked by weight
