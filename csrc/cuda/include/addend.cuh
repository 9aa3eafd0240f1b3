// What the epilogue of a product adds to four neighbouring rows, fetched before the sums are there. Needs decode_common.cuh before it.
#pragma once

// Two elements a word, where they lie side by side (y_vector).
struct Addend {
  uint2 bias, residual;
};

// Of activation row n, from `row` on.
__device__ __forceinline__ Addend load_addend(const Params& p, int n, int row) {
  Addend found = {};
  if (row >= p.rows) return found;
  if (p.bias) found.bias = *(const uint2*)(p.bias + row);
  if (p.residual) found.residual = *(const uint2*)(p.residual + (size_t)n * p.rows + row);
  return found;
}

// Four rows of the product for activation row n, of which those from p.rows on are padding.
__device__ __forceinline__ void store_vector(const Params& p, int n, int row, const float4& sums, const Addend& add) {
  if (row >= p.rows) return;
  const uint2 b = add.bias, r = add.residual;
  *(ushort4*)(p.y + (size_t)n * p.rows + row) = make_ushort4(
      from_float(epilogue(p, sums.x, (u16)b.x, (u16)r.x)), from_float(epilogue(p, sums.y, (u16)(b.x >> 16), (u16)(r.x >> 16))),
      from_float(epilogue(p, sums.z, (u16)b.y, (u16)r.y)), from_float(epilogue(p, sums.w, (u16)(b.y >> 16), (u16)(r.y >> 16))));
}
