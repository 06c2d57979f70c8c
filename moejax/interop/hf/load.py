"""Reads a checkpoint folder: every tensor to where it is used, experts straight to host memory.

Tensor by tensor: one is read, dequantised, laid out and cast, then written into the buffer of its
parameter. The buffers become jax arrays leaf by leaf, on the CPU without a copy, so host memory
peaks at the size of the target and a few tensors.

Axis letters:
    Lm  MoE layers    E  experts
"""

import dataclasses
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core.errors import check
from moejax.core.memory import device_sharding, host_sharding, nbytes
from moejax.core.mesh import check_divisible
from moejax.core.safetensors import Stored
from moejax.experts.quantize import abstract_quantized
from moejax.interop.hf.architecture import Architecture
from moejax.interop.hf.buffers import make_buffers
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.packed import Tensor, unpacked
from moejax.interop.hf.plan import Piece, check_size, check_tensors, leaves_of, make_plan
from moejax.interop.hf.registry import find_architecture
from moejax.interop.hf.rope import context_of
from moejax.interop.hf.tensors import open_folder, read_json
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.quantized import Format, whole_matrix
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams, init_decoder
from moejax.models.experts import split_experts
from moejax.models.restore import ExpertMemory

OUT, EMBED = "lm_head.weight", "model.embed_tokens.weight"
# What older versions of libraries wrote beside the weights.
IGNORED = (r".*\.rotary_emb\.inv_freq$",)
Progress = Callable[[int, int], None]  # (bytes written, bytes of the target)
Count = Callable[[int], None]  # bytes written since the last call


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A checkpoint folder of which config.json and the headers of its files have been read."""

    path: pathlib.Path
    architecture: Architecture
    stored: dict[str, Stored]
    values: dict[str, Any]  # config.json
    fields: Fields
    cfg: DecoderConfig

    @property
    def context(self) -> int:
        """Positions that the model was made for."""
        return context_of(self.fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """A model read from a checkpoint, and what is needed to write it back.

    Attributes:
        params: without experts, on every device of the mesh.
        experts: [Lm, E, ...], sharded over the `expert` axis.
        hf_config: the config.json, without what described packed tensors.
        stored_dtypes: tensors that are stored in another dtype than `hf_config` says.
        context: positions that the model was made for.
        tensors_read: how many were read.
        unused: tensors of the folder that are not part of the decoder.
    """

    cfg: DecoderConfig
    params: DecoderParams
    experts: GatedWeights
    hf_config: dict[str, Any]
    stored_dtypes: dict[str, str]
    context: int
    tensors_read: int = 0
    unused: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return nbytes((self.params, self.experts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What is to be read of a folder: pieces of tensors, each to its parameters."""

    where: str
    plan: list[Piece]
    tensors: dict[str, Tensor]
    unused: tuple[str, ...] = ()


class Sink(Protocol):
    """Takes a parameter, piece by piece."""

    def put(self, index: tuple[int, ...], value: np.ndarray) -> int:
        """Puts `value` at `index` of the parameter's leading axes; the bytes that it takes."""
        ...


def load_folder(
    path: str | pathlib.Path | OpenModel,
    *,
    mesh: Mesh,
    dtype: str | None = None,
    experts_dtype: Format | None = None,
    expert_memory: ExpertMemory = "pinned_host",
    progress: Progress | None = None,
) -> Imported:
    """The model in folder `path`, which holds config.json and safetensors files.

    Args:
        path: the folder, or what `open_model` made of it.
        dtype: as in `open_model`; None where that was called.
        experts_dtype: quantises each matrix of the routed experts from its stored values, as it is
            read (`experts.quantize`); None keeps them.
        expert_memory: where the experts go; the rest goes to device memory.
        progress: called after every tensor.

    Raises `InputError` for an unknown architecture, an unsupported value or packing, a missing or
    damaged file, and tensors that are missing, too many, or of another shape. Warns of tensors that
    hold NaN; in experts that are quantised it is an error. Cost: one read of the files; host memory
    peaks at the target and two tensors, at three where one is quantised.
    """
    opened = path if isinstance(path, OpenModel) else open_model(path, dtype=dtype)
    stored, values = opened.stored, opened.values
    target = abstract_model(
        opened.cfg, mesh=mesh, expert_memory=expert_memory, experts_dtype=experts_dtype
    )
    reading = plan_reading(opened, target)
    params, experts = fill(target, reading, counter(progress, nbytes(target)))
    main = stored_dtype(opened.fields)
    return Imported(
        cfg=opened.cfg,
        params=params,
        experts=experts,
        hf_config={k: v for k, v in values.items() if k != "quantization_config"},
        stored_dtypes={
            piece.name: str(stored[piece.name].dtype)
            for piece in reading.plan
            if piece.name in stored
            and str(stored[piece.name].dtype) != main
            and stored[piece.name].dtype.itemsize > 1
        },
        context=opened.context,
        tensors_read=len({use for p in reading.plan for use in reading.tensors[p.name].uses}),
        unused=reading.unused,
    )


def open_model(path: str | pathlib.Path, *, dtype: str | None = None) -> OpenModel:
    """Reads what says what the model in folder `path` is, and no weights.

    Args:
        dtype: of the weights, `float32` or `bfloat16`; None for that of the checkpoint (float16
            becomes float32, which holds it exactly). Routers are always float32.
    """
    folder = pathlib.Path(path)
    values = read_json(folder / "config.json")
    architecture, stored = find_architecture(values, folder), open_folder(folder)
    # Libraries leave this field out where it has their default, which is not always the same.
    fields = Fields({"tie_word_embeddings": OUT not in stored} | values)
    cfg = dataclasses.replace(architecture.read_config(fields), dtype=pick_dtype(fields, dtype))
    return OpenModel(
        path=folder,
        architecture=architecture,
        stored=stored,
        values=values,
        fields=fields,
        cfg=cfg,
    )


def stored_dtype(fields: Fields) -> str:
    """The dtype that a config.json names, float32 where it names none."""
    return fields.text("dtype", "torch_dtype", default="float32").removeprefix("torch.")


def pick_dtype(fields: Fields, wanted: str | None) -> Any:
    """`wanted`, or what holds the checkpoint's dtype exactly."""
    stored = stored_dtype(fields)
    known = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}
    check(stored in known, f"config.json: dtype={stored!r} is not one of {', '.join(known)}")
    return wanted or known[stored]


def abstract_model(
    cfg: DecoderConfig,
    *,
    mesh: Mesh,
    expert_memory: ExpertMemory,
    experts_dtype: Format | None = None,
) -> tuple[DecoderParams, GatedWeights]:
    """Shapes, dtypes and shardings of the parameters without experts, and of the experts."""
    check_divisible(cfg.moe.num_experts, mesh)
    place = {"pinned_host": host_sharding, "device": device_sharding}[expert_memory]

    def init(key: jax.Array) -> tuple[DecoderParams, GatedWeights]:
        return split_experts(init_decoder(key, cfg), cfg)

    shapes = jax.eval_shape(init, jax.random.key(0))

    def struct(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    dense = jax.tree.map(partial(struct, sharding=device_sharding(mesh)), shapes[0])
    experts = jax.tree.map(partial(struct, sharding=place(mesh, P(None, "expert"))), shapes[1])
    return dense, experts if experts_dtype is None else abstract_quantized(experts, experts_dtype)


def plan_reading(opened: OpenModel, target: Any) -> Reading:
    """How the tensors of a folder fill `target`, as `abstract_model` gives it.

    Raises `InputError` for tensors that are missing, too many or of another shape.
    """
    cfg, architecture, where = opened.cfg, opened.architecture, str(opened.path)
    tensors = unpacked(opened.stored, opened.values.get("quantization_config"))
    plan = make_plan(architecture.rules(cfg), cfg, leaves_of(target), tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    ignored = (*IGNORED, *architecture.ignored(cfg))
    ignored = (*ignored, *map(re.escape, architecture.placeholders(cfg)))
    if cfg.tie_embeddings and OUT in tensors:
        same = np.array_equal(tensors[OUT].read(None), tensors[EMBED].read(None))
        check(same, f"{where}: embeddings are tied, but {OUT} differs from {EMBED}")
        ignored = (*ignored, re.escape(OUT))
    unused = check_tensors(plan, shapes, ignored, where)
    for piece in plan:  # before room is made for sizes that the tensors do not have
        check_size(piece, tensors[piece.name].shape, where)
    return Reading(where=where, plan=plan, tensors=tensors, unused=tuple(unused))


def fill(target: Any, reading: Reading, count: Count) -> Any:
    """The arrays of `target`, put together from what `reading` names."""
    buffers = {name: make_buffers(name, leaf) for name, leaf in leaves_of(target).items()}
    put_pieces(reading, buffers, count)
    # Leaves come in the order of the tree.
    leaves = [buffers[name].finish() for name in list(buffers)]
    return jax.tree.unflatten(jax.tree.structure(target, is_leaf=whole_matrix), leaves)


def put_pieces(reading: Reading, sinks: Mapping[str, Sink], count: Count) -> None:
    """Reads piece by piece into the sinks of their parameters. Warns of tensors that hold NaN."""
    with_nan = []
    for piece in reading.plan:
        size, is_nan = _put(piece, reading.tensors[piece.name], sinks)
        count(size)
        if is_nan:
            with_nan.append(piece.name)
    if with_nan:
        names = ", ".join(dict.fromkeys(with_nan[:3]))
        warnings.warn(f"{reading.where}: {len(with_nan)} tensors hold NaN: {names}", stacklevel=4)


def counter(progress: Progress | None, total: int) -> Count:
    """Tells `progress` how much of `total` bytes has been done."""
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress(done, total)

    return count


def _put(piece: Piece, tensor: Tensor, sinks: Mapping[str, Sink]) -> tuple[int, bool]:
    """Reads one piece into its sinks; its bytes there, and whether it holds NaN.

    A function of its own, so that nothing of a tensor outlives it.
    """
    array = tensor.read(piece.row)
    arrays = piece.how.load(array, [to.shape for to in piece.targets])
    parts = zip(arrays, piece.targets, strict=True)
    size = sum(sinks[to.leaf].put(to.index, part) for part, to in parts)
    with np.errstate(invalid="ignore"):
        return size, bool(np.isnan(array.max(initial=0)))
