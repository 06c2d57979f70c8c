"""`exact_jit`: for tests that compare programs bit by bit.

Tests compile without fusion emitters at level 0 (`conftest.py`), in a fifth of the time; XLA:CPU
then rounds a product's sum differently from one program to the next. With them it does not.
"""

import functools

import jax

exact_jit = functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True})
