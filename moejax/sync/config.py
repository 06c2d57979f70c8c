"""A sync plan by name and numbers: `--set sync.method=diloco --set sync.every=16`.

What the methods are is said in `moejax.sync.plan`; here each gets its numbers, and numbers that it
does not read are refused.
"""

import dataclasses
from typing import Literal, get_args

from moejax.collectives.codecs import Bfloat16, BlockQuant, TopK, TwoBit
from moejax.collectives.schedule import Codec
from moejax.core.errors import check
from moejax.sync.plan import Outer

Method = Literal[
    "none", "gradients", "local_sgd", "dream_ddp", "diloco", "streaming_diloco", "cd_sgd"
]
CodecName = Literal["float32", "bfloat16", "int8", "int4", "two_bit", "top_k"]
_OUTER = ("every", "outer_learning_rate", "outer_momentum", "codec")
READS: dict[str, tuple[str, ...]] = {
    "none": (),
    "gradients": ("codec",),
    "local_sgd": ("every",),
    "dream_ddp": ("every", "link_ratio"),
    "diloco": _OUTER,
    "streaming_diloco": (*_OUTER, "num_fragments", "keep_local"),
    "cd_sgd": ("threshold", "exact_every", "feedback"),
}
CODEC_READS = {"two_bit": ("threshold",), "top_k": ("kept", "block")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """How workers, the coordinates of the `data` axis, stay together.

    Attributes:
        method: `none` is one run with one copy of the weights; `gradients` reduces gradients in
            every step; the others are local methods.
        codec: of what is sent. By default int4 for `streaming_diloco`, float32 for the others.
        feedback: whether what a codec leaves out is sent later.
        common_steps: taken synchronously, in full, before a local method begins.
        every: H, steps of a period.
        outer_learning_rate, outer_momentum: of the outer optimizer (Nesterov).
        num_fragments, keep_local: of Streaming DiLoCo.
        link_ratio: of DreamDDP, seconds to send all weights over seconds of a backward pass.
        threshold: of two-bit codes, those of CD-SGD too.
        exact_every: k of CD-SGD: every k-th exchange is in full.
        kept, block: top-k sends `kept` of every `block` elements.
    """

    method: Method = "none"
    codec: CodecName | None = None
    feedback: bool = True
    common_steps: int = 0
    every: int = 16
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.9
    num_fragments: int = 2
    keep_local: float = 0.5
    link_ratio: float = 16.0
    threshold: float = 1e-3
    exact_every: int = 8
    kept: int = 20
    block: int = 1000

    def __post_init__(self):
        methods, codecs = get_args(Method), (None, *get_args(CodecName))
        check(self.method in methods, f"method={self.method!r} is not one of {methods}")
        check(self.codec in codecs, f"codec={self.codec!r} is not one of {codecs}")
        for name in ("every", "num_fragments", "exact_every"):
            value = getattr(self, name)
            check(value >= 1, f"{name}={value} must be at least 1")
        check(self.common_steps >= 0, f"common_steps={self.common_steps} must not be negative")
        check(self.link_ratio > 0, f"link_ratio={self.link_ratio} must be positive")
        check(0 <= self.keep_local < 1, f"keep_local={self.keep_local} must be in [0, 1)")
        self._check_unread()
        self.make_codec()
        self.make_outer()

    def _check_unread(self) -> None:
        codec = self.make_codec()
        reads = {"method", *READS[self.method], *CODEC_READS.get(self.codec or "", ())}
        if codec is not None:
            reads.add("feedback")
        if self.method not in ("none", "gradients"):
            reads.add("common_steps")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check(
                field.name in reads or value == field.default,
                f"{field.name}={value!r} has no meaning for method={self.method!r}, "
                f"codec={self.codec!r}",
            )

    def make_codec(self) -> Codec | None:
        """What codes a message; None for float32."""
        default = "int4" if self.method == "streaming_diloco" else "float32"
        return {
            "float32": lambda: None,
            "bfloat16": Bfloat16,
            "int8": BlockQuant,
            "int4": lambda: BlockQuant(4, 32),
            "two_bit": lambda: TwoBit(self.threshold),
            "top_k": lambda: TopK(self.kept, self.block),
        }[self.codec or default]()

    def make_outer(self) -> Outer:
        """The outer optimizer of these numbers."""
        return Outer(learning_rate=self.outer_learning_rate, momentum=self.outer_momentum)
