"""Flags of the benchmarks of whole decoders: which shape, which batch sizes, which budget."""

from absl import flags

SHAPE = flags.DEFINE_string("shape", "olmoe-400m", "named shape, see configs/shapes.py")
BATCH = flags.DEFINE_list("batch", ["1", "8"], "batch sizes")
BUDGET = flags.DEFINE_string("device_budget", "25%", "device memory: 8GiB, or 25% of experts")
