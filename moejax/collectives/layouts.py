"""What a collective is: which chunks every rank brings, and which it returns.

    operation         start of rank r           end of rank r
    reduce_scatter    all chunks                block r of R
    all_gather        block r of R              all chunks
    all_reduce        all chunks                all chunks
    all_to_all        blocks (r, 0..R-1)        blocks (0..R-1, r) of R * R
    round_trip        blocks (r, 0..R-1)        the same, and block (a, b) was on rank b
    broadcast         block r of R              block 0
    parity            all blocks but r of R     block r, which it never had

Blocks are runs of equally many chunks. Each chunk that a rank returns holds the contributions of
all ranks that started with it; the operations differ in their layouts only.
"""

from collections.abc import Iterable
from typing import get_args

from moejax.collectives.schedule import Operation
from moejax.core.errors import check

Layout = tuple[tuple[int, ...], ...]  # per rank, the chunks that it has


def layouts(operation: Operation, ranks: int, num_chunks: int) -> tuple[Layout, Layout]:
    """Start and end of an operation; raises `InputError` when the chunks make no equal blocks."""
    blocks = _num_blocks(operation, ranks)
    check(
        num_chunks >= blocks and num_chunks % blocks == 0,
        f"{operation} over {ranks} ranks wants a multiple of {blocks} chunks, got {num_chunks}",
    )
    check(operation != "parity" or ranks > 1, "parity wants at least 2 ranks, got 1")
    size = num_chunks // blocks

    def of_blocks(chosen: Iterable[int]) -> tuple[int, ...]:
        return tuple(chunk for b in chosen for chunk in range(b * size, (b + 1) * size))

    everything = (tuple(range(num_chunks)),) * ranks
    own = tuple(of_blocks([r]) for r in range(ranks))
    if operation in ("all_to_all", "round_trip"):
        sent = tuple(of_blocks(range(r * ranks, (r + 1) * ranks)) for r in range(ranks))
        if operation == "round_trip":
            return sent, sent
        return sent, tuple(of_blocks(range(r, blocks, ranks)) for r in range(ranks))
    if operation == "parity":
        return tuple(of_blocks(b for b in range(ranks) if b != r) for r in range(ranks)), own
    return {
        "reduce_scatter": (everything, own),
        "all_gather": (own, everything),
        "all_reduce": (everything, everything),
        "broadcast": (own, (of_blocks([0]),) * ranks),
    }[operation]


def _num_blocks(operation: Operation, ranks: int) -> int:
    known = get_args(Operation)
    check(operation in known, f"operation={operation!r} is not one of {known}")
    squared = {"all_to_all": ranks * ranks, "round_trip": ranks * ranks}
    return squared.get(operation, 1 if operation == "all_reduce" else ranks)
