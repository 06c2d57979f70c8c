"""Small scheduled modules, written by hand in the form that libtpu 0.0.42 prints."""

# A loop body that fetches a row of a host stack behind one matrix product (%fusion.1), waits, and
# writes it into a cache in place; and a second, synchronous fetch.
STREAM = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[16,256,128]{2,1,0:S(5)})->bf16[8,256]{1,0}}

%fused_dot (p0: bf16[8,256], p1: bf16[256,256]) -> bf16[8,256] {
  %p0 = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[256,256]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} convolution(%p0, %p1), dim_labels=bf_io->bf, metadata={op_name="jit(step)/while/body/moe_experts/dot_general"}
}

%fused_update (p0.1: bf16[4,256,128], p1.1: bf16[1,256,128], p2.1: s32[]) -> bf16[4,256,128] {
  %p0.1 = bf16[4,256,128]{2,1,0} parameter(0)
  %p1.1 = bf16[1,256,128]{2,1,0} parameter(1)
  %p2.1 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update.1 = bf16[4,256,128]{2,1,0} dynamic-update-slice(%p0.1, %p1.1, %p2.1, %zero, %zero)
}

%body (arg: (s32[], bf16[8,256], bf16[16,256,128], bf16[4,256,128])) -> (s32[], bf16[8,256], bf16[16,256,128], bf16[4,256,128]) {
  %arg = (s32[]{:T(128)}, bf16[8,256]{1,0}, bf16[16,256,128]{2,1,0:T(8,128)(2,1)S(5)}, /*index=3*/bf16[4,256,128]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[8,256]{1,0} get-tuple-element(%arg), index=1
  %store = bf16[16,256,128]{2,1,0:T(8,128)(2,1)S(5)} get-tuple-element(%arg), index=2
  %cache = bf16[4,256,128]{2,1,0} get-tuple-element(%arg), index=3
  %c0 = s32[]{:T(128)} constant(0)
  %w = bf16[256,256]{1,0} constant({...})
  %fetch-start = ((bf16[16,256,128]{2,1,0:T(8,128)(2,1)S(5)}, s32[]{:T(128)}, s32[], s32[]), bf16[1,256,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) dynamic-slice-start(%store, %i, %c0, %c0), dynamic_slice_sizes={1,256,128}, metadata={op_name="jit(step)/while/body/offload_prefetch/dynamic_slice" stack_frame_id=9}
  %fusion.1 = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %w), kind=kOutput, calls=%fused_dot, metadata={op_name="jit(step)/while/body/moe_experts/dot_general"}
  %fetch-done = bf16[1,256,128]{2,1,0:T(8,128)(2,1)} dynamic-slice-done(%fetch-start), metadata={op_name="jit(step)/while/body/offload_prefetch/dynamic_slice"}
  %late-start = ((bf16[16,256,128]{2,1,0:S(5)}, s32[], s32[], s32[]), bf16[1,256,128]{2,1,0}, u32[]{:S(2)}) dynamic-slice-start(%store, %i, %c0, %c0), dynamic_slice_sizes={1,256,128}, metadata={op_name="jit(step)/while/body/late_prefetch/dynamic_slice"}
  %late-done = bf16[1,256,128]{2,1,0} dynamic-slice-done(%late-start)
  %fusion.2 = bf16[4,256,128]{2,1,0} fusion(%cache, %fetch-done, %i), kind=kLoop, calls=%fused_update
  ROOT %out = (s32[]{:T(128)}, bf16[8,256]{1,0}, bf16[16,256,128]{2,1,0:S(5)}, bf16[4,256,128]{2,1,0}) tuple(%i, %fusion.1, %store, %fusion.2)
}

%condition (arg.1: (s32[], bf16[8,256], bf16[16,256,128], bf16[4,256,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[8,256]{1,0}, bf16[16,256,128]{2,1,0:S(5)}, bf16[4,256,128]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %n = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main (store.1: bf16[16,256,128], x.1: bf16[8,256], cache.1: bf16[4,256,128]) -> bf16[8,256] {
  %store.1 = bf16[16,256,128]{2,1,0:S(5)} parameter(0), metadata={op_name="store"}
  %x.1 = bf16[8,256]{1,0} parameter(1)
  %cache.1 = bf16[4,256,128]{2,1,0} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  %tuple.1 = (s32[]{:T(128)}, bf16[8,256]{1,0}, bf16[16,256,128]{2,1,0:S(5)}, bf16[4,256,128]{2,1,0}) tuple(%zero.1, %x.1, %store.1, %cache.1)
  %while.1 = (s32[]{:T(128)}, bf16[8,256]{1,0}, bf16[16,256,128]{2,1,0:S(5)}, bf16[4,256,128]{2,1,0}) while(%tuple.1), condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  ROOT %result = bf16[8,256]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501

# Every way to write a whole buffer anew, and ways not to.
COPIES = """\
HloModule jit_copies, is_scheduled=true

%fused_convert (p: bf16[4,256,128]) -> f32[4,256,128] {
  %p = bf16[4,256,128]{2,1,0} parameter(0)
  ROOT %convert.1 = f32[4,256,128]{2,1,0} convert(%p)
}

%fused_two (q: bf16[4,256,128], r: bf16[1,256,128], s: s32[]) -> (bf16[4,256,128], bf16[4,256,128]) {
  %q = bf16[4,256,128]{2,1,0} parameter(0)
  %r = bf16[1,256,128]{2,1,0} parameter(1)
  %s = s32[] parameter(2)
  %z = s32[] constant(0)
  %in_place = bf16[4,256,128]{2,1,0} dynamic-update-slice(%q, %r, %s, %z, %z)
  %negate.1 = bf16[4,256,128]{2,1,0} negate(%q)
  ROOT %two = (bf16[4,256,128]{2,1,0}, bf16[4,256,128]{2,1,0}) tuple(%in_place, %negate.1)
}

ENTRY %main (a: bf16[4,256,128], row: bf16[1,256,128], i: s32[]) -> bf16[4,256,128] {
  %a = bf16[4,256,128]{2,1,0} parameter(0)
  %row = bf16[1,256,128]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %view = bf16[1,4,256,128]{3,2,1,0} bitcast(%a)
  %plain = bf16[4,256,128]{2,1,0} copy(%a)
  %start = (bf16[4,256,128]{2,1,0:S(1)}, bf16[4,256,128]{2,1,0}, u32[]{:S(2)}) copy-start(%a)
  %done = bf16[4,256,128]{2,1,0:S(1)} copy-done(%start)
  %turned = bf16[4,128,256]{2,1,0} transpose(%a), dimensions={0,2,1}
  %wide = f32[4,256,128]{2,1,0} fusion(%a), kind=kLoop, calls=%fused_convert
  %pair = (bf16[4,256,128]{2,1,0}, bf16[4,256,128]{2,1,0}) fusion(%a, %row, %i), kind=kLoop, calls=%fused_two
  %small = bf16[1,256,128]{2,1,0} copy(%row)
  ROOT %updated = bf16[4,256,128]{2,1,0} dynamic-update-slice(%a, %row, %i, %zero, %zero)
}
"""  # noqa: E501

# Host work inside a program.
HOST = """\
HloModule jit_host, is_scheduled=true

%on_host (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:S(5)} parameter(0)
  ROOT %dot.1 = f32[8,128]{1,0:S(5)} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %to_host = (f32[8,128]{1,0:S(5)}, f32[8,128]{1,0}, u32[]) copy-start(%x)
  %on_host.0 = f32[8,128]{1,0:S(5)} copy-done(%to_host)
  %call-start = ((f32[8,128]{1,0:S(5)}), f32[8,128]{1,0:S(5)}, u32[]) custom-call-start(%on_host.0), async_execution_thread="host", custom_call_target="HostExecute", called_computations={%on_host}
  %call-done = f32[8,128]{1,0:S(5)} custom-call-done(%call-start), async_execution_thread="host", custom_call_target="HostExecute", called_computations={%on_host}
  %back = f32[8,128]{1,0} copy(%call-done)
  %token = token[] after-all()
  %send = (f32[8,128]{1,0}, u32[], token[]) send(%back, %token), channel_id=1, is_host_transfer=true
  %sent = token[] send-done(%send), channel_id=1, is_host_transfer=true
  ROOT %y = f32[8,128]{1,0} custom-call(%back), custom_call_target="xla_ffi_python_cpu_callback"
}
"""  # noqa: E501
