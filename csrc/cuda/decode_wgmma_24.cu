// y = x · Wᵀ for 2:4 weights and 17 to 128 activation rows on Hopper (sm_90a).
//
// `weight` is the layout of decode_nm.cu: a lane's 16 bytes are its part of operand A of a sparse wgmma just as of a sparse mma, so
// W still goes from global memory straight to registers. x is operand B, read from shared memory once for 64 rows of W.
// A block has WARPS_ROW / 4 warpgroups of 64 weight rows each; WARPS_K, PARTS and ROW_TILES are 1. One round is one unit of 256
// columns. Registers hold two units; as soon as a pair of steps has been multiplied, its registers receive those of two units on.
#define X_PAD 0
#include "decode_common.cuh"

#if N_TILES != 4 && N_TILES != 8 && N_TILES != 16
#error "decode_wgmma_24 has forms for 32, 64 and 128 activation rows"
#endif
#if WARPS_K != 1 || PARTS != 1 || ROW_TILES != 1 || WARPS_ROW % 4 != 0 || STAGES < 3
#error "decode_wgmma_24 takes whole warpgroups along the rows, and three buffers or more"
#endif

#define COLUMNS (8 * N_TILES)
// A buffer of x: four sub-tiles of COLUMNS rows by 128 bytes (64 columns), 16-byte chunks exchanged by the row modulo 8.
#define SUB_BYTES (COLUMNS * 128)
#define STAGE_BYTES (4 * SUB_BYTES)

#if ELEM_BF16
#define WGMMA_TYPES "f32.bf16.bf16"
#else
#define WGMMA_TYPES "f32.f16.f16"
#endif

#define D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define D16(i) D4(i), D4(i + 1), D4(i + 2), D4(i + 3)
#define OPERANDS "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(meta), "n"(SELECTOR)

// d (64 rows of W by 8 * N_TILES rows of x) += A (64 x 32, two of four kept) · B (32 columns of x). Asynchronous: the operands'
// registers and shared memory are read until wait_products.
template <int SELECTOR>
__device__ __forceinline__ void wgmma_sparse(float (&d)[N_TILES][4], const uint4& a, u64 b, u32 meta) {
#if N_TILES == 4
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n32k32." WGMMA_TYPES " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
               "%14, %15}, {%16, %17, %18, %19}, %20, %21, %22, 1, 1, 1, 0;"
               : D16(0)
               : OPERANDS);
#elif N_TILES == 8
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n64k32." WGMMA_TYPES " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
               "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, %37, "
               "%38, 1, 1, 1, 0;"
               : D16(0), D16(4)
               : OPERANDS);
#else
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n128k32." WGMMA_TYPES " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
               "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
               "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
               "%62, %63}, {%64, %65, %66, %67}, %68, %69, %70, 1, 1, 1, 0;"
               : D16(0), D16(4), D16(8), D16(12)
               : OPERANDS);
#endif
}

__device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Shared-memory descriptor: start and 1,024 bytes between groups of eight rows, both in 16 bytes; exchange pattern of 128 bytes.
__device__ __forceinline__ u64 describe(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

__device__ __forceinline__ u32 place(int row, int chunk) { return (chunk >> 3) * SUB_BYTES + row * 128 + (((chunk & 7) ^ (row & 7)) << 4); }

// Starts copying x columns [column, column + 256) into the buffer at `stage`; columns from `cols` on become zero.
__device__ __forceinline__ void stage_unit(unsigned char* stage, const Params& p, int column) {
  for (int i = threadIdx.x; i < p.m * 32; i += THREADS) {
    const int row = i >> 5, chunk = i & 31, c = column + chunk * 8;
    const u16* source = p.x + (size_t)row * p.ldx + c;
    unsigned char* target = stage + place(row, chunk);
    if (p.x_vector) {
      const int bytes = c < p.cols ? 16 : 0;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(bytes ? source : p.x), "r"(bytes)
                   : "memory");
    } else {
      u32 word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const u32 low = c + 2 * j < p.cols ? source[2 * j] : 0, high = c + 2 * j + 1 < p.cols ? source[2 * j + 1] : 0;
        word[j] = low | high << 16;
      }
      *(uint4*)target = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode_wgmma_24(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int begin = (int)((long long)p.units * blockIdx.y / gridDim.y), end = (int)((long long)p.units * (blockIdx.y + 1) / gridDim.y);
  const int rounds = end - begin;
  const u64 policy = weight_policy();

  // Tiles behind the last row read the last tile again; their sums are not stored.
  const int tile = min((int)blockIdx.x * WARPS_ROW + warp, (p.rows + 15) / 16 - 1);
  const uint4* next = p.weight + ((size_t)tile * p.units + begin) * (9 * 32) + lane; // of this round's unit
  uint4 values[2][8], positions[2];
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    if (u >= rounds) break;
    positions[u] = load_weight(next + u * (9 * 32), policy);
#pragma unroll
    for (int s = 0; s < 8; ++s)
      values[u][s] = load_weight(next + u * (9 * 32) + (s + 1) * 32, policy);
  }
  release_successor();
  const int padding = (COLUMNS - p.m) * 32;
  for (int s = 0; s < STAGES; ++s)
    for (int i = threadIdx.x; i < padding; i += THREADS)
      *(uint4*)(smem + s * STAGE_BYTES + place(p.m + (i >> 5), i & 31)) = make_uint4(0, 0, 0, 0);
  wait_predecessor();
#pragma unroll
  for (int s = 0; s < STAGES - 2; ++s) {
    if (s < rounds) stage_unit(smem + s * STAGE_BYTES, p, (begin + s) * UNIT);
    commit_stage();
  }

  float acc[1][N_TILES][4] = {};
  int slot = 0;
  for (int pair = 0; pair < rounds; pair += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int round = pair + half;
      if (round >= rounds) break;
      // This round's x has landed and is visible to the tensor cores; the products of two rounds ago no longer read theirs.
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 3) : "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncthreads();
      const int ahead = round + STAGES - 2, free_slot = slot + STAGES - 2 >= STAGES ? slot - 2 : slot + STAGES - 2;
      if (ahead < rounds) stage_unit(smem + free_slot * STAGE_BYTES, p, (begin + ahead) * UNIT);
      commit_stage();
      const u32 x = shared_address(smem) + slot * STAGE_BYTES;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const u32 meta = q == 0 ? positions[half].x : q == 1 ? positions[half].y : q == 2 ? positions[half].z : positions[half].w;
        fence_registers();
        wgmma_sparse<0>(acc[0], values[half][2 * q], describe(x + q * SUB_BYTES), meta);
        wgmma_sparse<1>(acc[0], values[half][2 * q + 1], describe(x + q * SUB_BYTES + 64), meta);
        commit_products();
        wait_products<1>();
        if (q == 0) {
          if (round > 0 && round + 1 < rounds) {
            positions[half ^ 1] = load_weight(next + 9 * 32, policy);
            values[half ^ 1][6] = load_weight(next + (9 + 7) * 32, policy);
            values[half ^ 1][7] = load_weight(next + (9 + 8) * 32, policy);
          }
        } else if (round + 2 < rounds) {
          values[half][2 * q - 2] = load_weight(next + (18 + 2 * q - 1) * 32, policy);
          values[half][2 * q - 1] = load_weight(next + (18 + 2 * q) * 32, policy);
        }
      }
      next += 9 * 32;
      slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
  }
  wait_products<0>();
  reduce_and_store(smem, p, acc);
}
