"""`exact_jit`: for tests that compare programs bit by bit.

Tests compile without fusion emitters at level 0 (`conftest.py`), in a fifth of the time; XLA:CPU
then rounds a product's sum differently from one program to the next. With them it does not.
"""

import functools

import jax

from moejax.core.compat import cheap_cpu_options

exact_jit = functools.partial(jax.jit, compiler_options=cheap_cpu_options(0, exact=True))
