// y = x · Wᵀ for 2:4 weights of 8-bit values and many activation rows on Hopper (sm_90a): sparse wgmma over the frame of
// prefill_common.cuh, both operands in shared memory.
//
// `weight`, for B = ceil(rows / 64) row blocks and S = 2 ceil(cols / 256) stages of 128 columns: [B][S][BLOCK_BYTES], of which
//   4,096 bytes  kept values, [64 rows][64], as wgmma reads operand A: 16-byte chunk c of row r stands at chunk c ^ (r / 2 % 4)
//   1,024 bytes  positions, [128 threads][2 steps of 64 columns] u32: of warp w and lane (g, q) row 16 w + g + 8 (q & 1) and columns
//                32 (q / 2) on, four bits for each group of four
// One bulk copy brings a block's stage behind the activations of the same columns.
#define BLOCK_BYTES 5120
#define POSITIONS_AT 4096
#define WEIGHT_STAGE_BYTES (M_BLOCKS * CONSUMERS * BLOCK_BYTES)
#define TENSOR_STORES 1
// Operands take no registers of the consumers.
#define PRODUCER_REGISTERS 40
#include "prefill_common.cuh"

static_assert(VALUES == 1 || VALUES == 2, "values of 8 bits");

struct Weights {
  __device__ __forceinline__ Weights(const Params&, u32, int, int, int) {}

  static __device__ __forceinline__ void produce(const Params& p, u32 target, u32 barrier, int tile, int stage) {
    const int i = threadIdx.x & 31;
    if (i >= M_BLOCKS * CONSUMERS) return;
    // Blocks behind the last row read the last one again; their sums are not stored.
    const int block = min(tile / 4 + i, (p.rows + 63) / 64 - 1);
    const unsigned char* source = (const unsigned char*)p.weight + ((size_t)block * (2 * p.units) + stage) * BLOCK_BYTES;
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    bulk_copy(target + i * BLOCK_BYTES, source, BLOCK_BYTES, barrier, policy);
  }

  // Zeros are in their registers before the first product.
  static __device__ __forceinline__ void hold(Sum (&d)[M_BLOCKS][N_TILES][4]) {
#pragma unroll
    for (int i = 0; i < M_BLOCKS * N_TILES; ++i) {
      Sum(&sum)[4] = d[i / N_TILES][i % N_TILES];
      asm volatile("" : SUM_REGISTER(sum[0]), SUM_REGISTER(sum[1]), SUM_REGISTER(sum[2]), SUM_REGISTER(sum[3])::"memory");
    }
  }

  __device__ __forceinline__ void start(const Params&, int, int) {}

  __device__ __forceinline__ void multiply_all(Sum (&d)[M_BLOCKS][N_TILES][4], const Params&, Buffers& x, int rounds) {
    hold(d);
    const u32 own = X_STAGE_BYTES + (threadIdx.x >> 7) * (M_BLOCKS * BLOCK_BYTES);
    for (int round = 0; round < rounds; ++round) {
      // Products under way read the positions of the stage before.
      u32 positions[2][M_BLOCKS][2];
#pragma unroll
      for (int stage = 0; stage < 2; ++stage) {
        const u32 buffer = x.open(), weights = buffer + own;
#pragma unroll
        for (int mb = 0; mb < M_BLOCKS; ++mb)
          asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                       : "=r"(positions[stage][mb][0]), "=r"(positions[stage][mb][1])
                       : "r"(weights + mb * BLOCK_BYTES + POSITIONS_AT + (threadIdx.x & 127) * 8)
                       : "memory");
        fence_registers();
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int mb = 0; mb < M_BLOCKS; ++mb)
            wgmma_sparse_shared(d[mb], describe_rows64(weights + mb * BLOCK_BYTES + step * 32), describe(buffer + step * 64),
                                positions[stage][mb][step]);
        commit_products();
        // The lane that gives a buffer back does so for what all lanes have read of it.
        __syncwarp();
        x.close(true, true);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) prefill_nm8(const __grid_constant__ Params p) { prefill<Weights>(p); }
