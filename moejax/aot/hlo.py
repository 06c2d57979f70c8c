"""A reader of XLA's HLO text: computations, and their instructions in schedule order.

It reads what `Compiled.as_text()` prints of a scheduled module (`is_scheduled=true`): within a
computation, the order of the lines is the order of issue. Only what the facts need is kept.
"""

import dataclasses
import re
from collections.abc import Iterator

from moejax.core.errors import check

# Memory spaces in layouts: `S(5)` is host memory on TPU and GPU; `S(1)` is the TPU's VMEM.
HOST_SPACE = 5
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape of one array value, e.g. `bf16[8,512]{1,0:T(8,128)(2,1)S(5)}`."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def nbytes(self) -> int:
        """Bytes of the values, without padding by the layout."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.findall(r"\d+", self.dtype)[0])
        size = 1
        for dim in self.dims:
            size *= dim
        return (size * bits + 7) // 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    type: str  # result type as printed
    operands: tuple[str, ...]
    called: tuple[str, ...]  # computations
    scope: str  # op_name: the path of named scopes, ending in the primitive
    target: str  # of a custom call
    is_root: bool
    line: str

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All arrays of the result, tuples flattened."""
        return parse_arrays(self.type)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """A compiled program; computations in the order of the text."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    def instructions(self) -> Iterator[tuple[str, int, Instruction]]:
        """(computation, position, instruction) of everything that is scheduled.

        Bodies of fusions, reducers and host computations are not: they are part of the instruction
        that calls them.
        """
        for name in self.scheduled():
            for position, instruction in enumerate(self.computations[name]):
                yield name, position, instruction

    def scheduled(self) -> list[str]:
        """The entry computation and what it reaches through control flow, in text order."""
        found, todo = set(), [self.entry]
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                for instruction in self.computations[name]:
                    if instruction.opcode in ("while", "conditional", "call"):
                        todo.extend(instruction.called)
        return [name for name in self.computations if name in found]


def parse_arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a printed type, in order."""
    return tuple(
        Array(
            dtype,
            tuple(int(dim.removeprefix("<=")) for dim in dims.split(",") if dim),
            int(space[1]) if (space := re.search(r"S\((\d+)\)", layout)) else 0,
        )
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def tuple_elements(text: str) -> list[str]:
    """`((a, b), c)` -> ['(a, b)', 'c'], at the top level only; an array type is its own element."""
    text = re.sub(r"/\*.*?\*/", "", text)
    if not text.startswith("("):
        return [text]
    elements, depth, start = [], 0, 1
    for i, char in enumerate(text):
        depth += char in "({["
        depth -= char in ")}]"
        if (char == "," and depth == 1) or (char == ")" and depth == 0):
            elements.append(text[start:i].strip())
            start = i + 1
    return [element for element in elements if element]


def parse_hlo(text: str) -> Module:
    """Reads a scheduled module; raises `InputError` for any other text."""
    header = text.split("\n", 1)[0]
    check("is_scheduled=true" in header, f"not a scheduled HLO module: {header[:80]!r}")
    computations: dict[str, list[Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif not line.startswith(" ") and (match := _COMPUTATION.match(line)):
            current = computations.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_parse_instruction(match[2], match[3], bool(match[1]), line))
    check(bool(entry), "the HLO module has no ENTRY computation")
    return Module(computations={k: tuple(v) for k, v in computations.items()}, entry=entry)


def _parse_instruction(name: str, rest: str, is_root: bool, line: str) -> Instruction:
    end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode, _, tail = rest[end:].strip().partition("(")
    close = _balanced("(" + tail, 0)
    operands, attributes = tail[: close - 2], tail[close - 1 :]
    called = []
    for one, many in _CALLED.findall(attributes):
        called.extend([one] if one else (c.strip().lstrip("%") for c in many.split(",")))
    scope, target = _OP_NAME.search(attributes), _TARGET.search(attributes)
    return Instruction(
        name=name,
        opcode=opcode,
        type=rest[:end],
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
        called=tuple(called),
        scope=scope[1] if scope else "",
        target=target[1] if target else "",
        is_root=is_root,
        line=line.strip(),
    )


def _balanced(text: str, start: int) -> int:
    """Index just past the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += text[i] == "("
        depth -= text[i] == ")"
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[:120]!r}")
