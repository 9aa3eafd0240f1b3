// Products of weights from slots in shared memory on wgmma: a step of 32 columns, and a unit of eight steps of an N:M weight. Needs
// decode_common.cuh, expand.cuh, bulk.cuh and wgmma.cuh before it.
#pragma once
#include "slot_ring.cuh"

// d += one step's product of dense weights: operand A of 64 rows and 32 columns, operand B at shared address b.
__device__ __forceinline__ void multiply(float (&d)[N_TILES][4], const u32 (&a)[8], u32 b) {
  fence_registers();
  wgmma_dense(d, a[0], a[1], a[2], a[3], describe(b));
  wgmma_dense(d, a[4], a[5], a[6], a[7], describe(b + 32));
  commit_products();
}

#if !UNSTRUCTURED
// Operand A of two steps. Kept between units, since the last product of one may still read it when the next begins.
struct Operands {
#if PATTERN == 24
  uint4 a[2];
#else
  u32 a[2][8], codes[4];
#endif
};

// d += the products of the unit whose first 16 bytes of this lane lie at shared address `slot`; x gives operand B of each step.
template <class Activations>
__device__ __forceinline__ void multiply_unit(float (&d)[N_TILES][4], u32 slot, Activations& x, Operands& o) {
  u32 positions[4], values[3][4]; // of the next steps: shared memory's latency passes while earlier ones are multiplied
  load_shared_x4(slot, positions);
  load_shared_x4(slot + 512, values[0]);
  load_shared_x4(slot + 1024, values[1]);
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    if (s + 2 < 8) load_shared_x4(slot + (s + 3) * 512, values[(s + 2) % 3]);
    const u32(&now)[4] = values[s % 3];
    const uint4 v = make_uint4(now[0], now[1], now[2], now[3]);
#if PATTERN == 24
    o.a[s % 2] = v;
    const u32 b = x.open(s);
    fence_registers();
    if (s % 2 == 0)
      wgmma_sparse<0>(d, o.a[0], describe(b), positions[s / 2]);
    else
      wgmma_sparse<1>(d, o.a[1], describe(b), positions[s / 2]);
    commit_products();
#else
#pragma unroll
    for (int i = 0; i < 4; ++i)
      o.codes[i] = s % 2 == 0 ? code_selectors(positions[s / 2], i) : o.codes[i] >> 16;
    expand_step(v, o.codes, o.a[s % 2]);
    multiply(d, o.a[s % 2], x.open(s));
#endif
    x.close(s);
  }
}
#endif
