import pytest

from moejax.aot.hlo import Array, parse_arrays, parse_hlo, tuple_elements
from moejax.core.errors import InputError
from tests.aot.snippets import STREAM


def test_arrays_of_a_type():
    text = "(bf16[8,512]{1,0:T(8,128)(2,1)S(5)}, /*index=1*/u32[]{:S(2)}, pred[3]{0}, s4[5]{0})"
    arrays = parse_arrays(text)
    assert arrays == (
        Array("bf16", (8, 512), 5),
        Array("u32", (), 2),
        Array("pred", (3,), 0),
        Array("s4", (5,), 0),
    )
    assert [array.nbytes for array in arrays] == [8192, 4, 3, 3]


@pytest.mark.parametrize(
    "dtype, nbytes", [("f8e4m3fn", 8), ("f4e2m1fn", 4), ("c64", 64), ("s8", 8)]
)
def test_bytes_follow_the_dtype(dtype, nbytes):
    assert Array(dtype, (2, 4), 0).nbytes == nbytes


def test_tuple_elements_split_at_the_top_level_only():
    text = "((f32[2,3]{1,0:T(8,128)}, s32[]), f32[1,3]{1,0}, /*index=2*/u32[]{:S(2)})"
    assert tuple_elements(text) == [
        "(f32[2,3]{1,0:T(8,128)}, s32[])",
        "f32[1,3]{1,0}",
        "u32[]{:S(2)}",
    ]
    assert tuple_elements("f32[2,3]{1,0}") == ["f32[2,3]{1,0}"]


def test_instructions_in_schedule_order():
    module = parse_hlo(STREAM)
    assert module.entry == "main"
    assert module.scheduled() == ["body", "condition", "main"]
    names = [one.name for one in module.computations["body"]]
    assert names.index("fetch-start") < names.index("fusion.1") < names.index("fetch-done")
    start = module.computations["body"][names.index("fetch-start")]
    assert start.opcode == "dynamic-slice-start"
    assert start.operands == ("store", "i", "c0", "c0")
    assert start.scope == "jit(step)/while/body/offload_prefetch/dynamic_slice"
    loop = next(one for one in module.computations["main"] if one.opcode == "while")
    assert loop.called == ("condition", "body")
    assert [one.name for one in module.computations["body"] if one.is_root] == ["out"]


def test_only_scheduled_modules_are_read():
    with pytest.raises(InputError, match="not a scheduled HLO module: 'HloModule jit_step, "):
        parse_hlo(STREAM.replace("is_scheduled=true", "is_scheduled=false"))
