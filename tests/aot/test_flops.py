import jax
import jax.numpy as jnp

from moejax.aot.flops import flops
from moejax.aot.hlo import parse_hlo

TEXT = """\
HloModule jit_f, is_scheduled=true

%fused (p0: bf16[8,256], p1: bf16[256,128]) -> bf16[8,128] {
  %p0 = bf16[8,256]{1,0} parameter(0)
  %p1 = bf16[256,128]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[8,128]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%fused_transposed (q0: bf16[8,256], q1: bf16[128,256]) -> bf16[8,128] {
  %q0 = bf16[8,256]{1,0} parameter(0)
  %q1 = bf16[128,256]{1,0} parameter(1)
  ROOT %convolution.2 = bf16[8,128]{1,0} convolution(%q0, %q1), dim_labels=bf_oi->bf
}

ENTRY %main (x: bf16[8,256], w: bf16[256,128], v: bf16[128,256]) -> f32[4,8,16] {
  %x = bf16[8,256]{1,0} parameter(0)
  %w = bf16[256,128]{1,0} parameter(1)
  %v = bf16[128,256]{1,0} parameter(2)
  %one = bf16[8,128]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused
  %two = bf16[8,128]{1,0} fusion(%x, %v), kind=kOutput, calls=%fused_transposed
  %a = f32[4,8,32]{2,1,0} constant({...})
  %b = f32[4,32,16]{2,1,0} constant({...})
  %sum = bf16[8,128]{1,0} add(%one, %two)
  ROOT %three = f32[4,8,16]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, rhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_contracting_dims={1}
}
"""  # noqa: E501


def test_products_as_each_compiler_writes_them():
    module = parse_hlo(TEXT)
    counts = {one.name: flops(module, "main", one) for one in module.computations["main"]}
    assert {name: count for name, count in counts.items() if count} == {
        "one": 2 * 8 * 256 * 128,
        "two": 2 * 8 * 256 * 128,
        "three": 2 * 4 * 8 * 32 * 16,
    }


def test_a_compiled_loop_counts_one_trip():
    def f(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x) @ w[:, :7]

    args = jax.ShapeDtypeStruct((30, 40), jnp.float32), jax.ShapeDtypeStruct((40, 40), jnp.float32)
    module = parse_hlo(jax.jit(f).lower(*args).compile().as_text())
    total = sum(flops(module, module.entry, one) for one in module.computations[module.entry])
    assert total == 2 * 30 * 40 * 40 + 2 * 30 * 40 * 7
