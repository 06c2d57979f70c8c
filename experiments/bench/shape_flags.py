"""Flags of the benchmarks of whole decoders: which shape, which batch sizes."""

from absl import flags

SHAPE = flags.DEFINE_string("shape", "olmoe-400m", "named shape, see configs/shapes.py")
BATCH = flags.DEFINE_list("batch", ["1", "8"], "batch sizes")
