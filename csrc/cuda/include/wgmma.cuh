// Warpgroup products (sm_90a). Needs N_TILES, ELEM_BF16 (and VALUES for 8-bit operands), and the types u32 and u64 before it.
//
// d is a warpgroup's m64 x n(8 * N_TILES) accumulator: warp w of the four holds rows 16w .. 16w + 15, each n-tile as one m16n8 fragment.
// A comes from registers, in the fragment order of mma.m16n8k16 (dense) and mma.sp.m16n8k32 (sparse); B from shared memory, one row of
// 64 columns in 128 bytes, 16-byte chunks exchanged by the row modulo 8. All products are asynchronous: their registers and shared
// memory are read until wait_products.
#pragma once

// VALUES 1 and 2 have sparse forms of 8-bit operands: e4m3 and signed integers, whose sums are integers.
#if VALUES == 2
typedef int Sum;
#define SUM_REGISTER "+r"
#else
typedef float Sum;
#define SUM_REGISTER "+f"
#endif

#if VALUES == 1
#define WGMMA_TYPES "f32.e4m3.e4m3"
#elif VALUES == 2
#define WGMMA_TYPES "s32.s8.s8"
#elif ELEM_BF16
#define WGMMA_TYPES "f32.bf16.bf16"
#else
#define WGMMA_TYPES "f32.f16.f16"
#endif

#define D4(i) SUM_REGISTER(d[i][0]), SUM_REGISTER(d[i][1]), SUM_REGISTER(d[i][2]), SUM_REGISTER(d[i][3])
#define D16(i) D4(i), D4(i + 1), D4(i + 2), D4(i + 3)
#define LIST4 "%0, %1, %2, %3"
#define LIST8 LIST4 ", %4, %5, %6, %7"
#define LIST16 LIST8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LIST32 LIST16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST64                                                                                                                             \
  LIST32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, " \
         "%57, %58, %59, %60, %61, %62, %63"
#define LIST96                                                                                                                             \
  LIST64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, " \
         "%89, %90, %91, %92, %93, %94, %95"
#define LIST128                                                                                                                            \
  LIST96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "    \
         "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LIST48 LIST32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"

#if N_TILES == 1
#define WGMMA_N "n8"
#define WGMMA_D LIST4
#define WGMMA_OPERANDS D4(0)
#define WGMMA_AB "{%4, %5, %6, %7}, %8"
#define WGMMA_META "%9, %10"
#define WGMMA_SHARED "%4, %5, %6, 0"
#elif N_TILES == 2
#define WGMMA_N "n16"
#define WGMMA_D LIST8
#define WGMMA_OPERANDS D4(0), D4(1)
#define WGMMA_AB "{%8, %9, %10, %11}, %12"
#define WGMMA_META "%13, %14"
#define WGMMA_SHARED "%8, %9, %10, 0"
#elif N_TILES == 4
#define WGMMA_N "n32"
#define WGMMA_D LIST16
#define WGMMA_OPERANDS D16(0)
#define WGMMA_AB "{%16, %17, %18, %19}, %20"
#define WGMMA_META "%21, %22"
#define WGMMA_SHARED "%16, %17, %18, 0"
#elif N_TILES == 8
#define WGMMA_N "n64"
#define WGMMA_D LIST32
#define WGMMA_OPERANDS D16(0), D16(4)
#define WGMMA_AB "{%32, %33, %34, %35}, %36"
#define WGMMA_META "%37, %38"
#define WGMMA_SHARED "%32, %33, %34, 0"
#elif N_TILES == 12
#define WGMMA_N "n96"
#define WGMMA_D LIST48
#define WGMMA_OPERANDS D16(0), D16(4), D16(8)
#define WGMMA_AB "{%48, %49, %50, %51}, %52"
#define WGMMA_META "%53, %54"
#define WGMMA_SHARED "%48, %49, %50, 0"
#elif N_TILES == 16
#define WGMMA_N "n128"
#define WGMMA_D LIST64
#define WGMMA_OPERANDS D16(0), D16(4), D16(8), D16(12)
#define WGMMA_AB "{%64, %65, %66, %67}, %68"
#define WGMMA_META "%69, %70"
#define WGMMA_SHARED "%64, %65, %66, 0"
#elif N_TILES == 24
#define WGMMA_N "n192"
#define WGMMA_D LIST96
#define WGMMA_OPERANDS D16(0), D16(4), D16(8), D16(12), D16(16), D16(20)
#define WGMMA_AB "{%96, %97, %98, %99}, %100"
#define WGMMA_META "%101, %102"
#define WGMMA_SHARED "%96, %97, %98, 0"
#elif N_TILES == 32
#define WGMMA_N "n256"
#define WGMMA_D LIST128
#define WGMMA_OPERANDS D16(0), D16(4), D16(8), D16(12), D16(16), D16(20), D16(24), D16(28)
#define WGMMA_AB "{%128, %129, %130, %131}, %132"
#define WGMMA_META "%133, %134"
#define WGMMA_SHARED "%128, %129, %130, 0"
#else
#error "wgmma.cuh has forms for 8, 16, 32, 64, 96, 128, 192 and 256 activation rows"
#endif

#if !VALUES
// d += A (64 x 16) · B (16 columns of x).
__device__ __forceinline__ void wgmma_dense(float (&d)[N_TILES][4], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64" WGMMA_N "k16." WGMMA_TYPES " {" WGMMA_D "}, " WGMMA_AB ", 1, 1, 1, 0;"
               : WGMMA_OPERANDS
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

#endif

#if VALUES == 1
#define WGMMA_SPARSE "k64." WGMMA_TYPES
#define WGMMA_SCALES ", 1, 1, 1;"
#elif VALUES == 2
#define WGMMA_SPARSE "k64." WGMMA_TYPES
#define WGMMA_SCALES ", 1;"
#else
#define WGMMA_SPARSE "k32." WGMMA_TYPES
#define WGMMA_SCALES ", 1, 1, 1, 0;"
#endif

// d += A (64 x 32 or, of 8-bit values, 64; two of four kept) · B (as many columns of x).
template <int SELECTOR>
__device__ __forceinline__ void wgmma_sparse(Sum (&d)[N_TILES][4], const uint4& a, u64 b, u32 meta) {
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64" WGMMA_N WGMMA_SPARSE " {" WGMMA_D "}, " WGMMA_AB ", " WGMMA_META WGMMA_SCALES
               : WGMMA_OPERANDS
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(meta), "n"(SELECTOR));
}

#if VALUES
// The same with A in shared memory too, [64][32 kept values] as describe_rows64 takes it.
__device__ __forceinline__ void wgmma_sparse_shared(Sum (&d)[N_TILES][4], u64 a, u64 b, u32 meta) {
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64" WGMMA_N WGMMA_SPARSE " {" WGMMA_D "}, " WGMMA_SHARED WGMMA_SCALES
               : WGMMA_OPERANDS
               : "l"(a), "l"(b), "r"(meta));
}
#endif

__device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Descriptor of B at `address` (1,024-byte aligned, or 32 bytes on per 16 columns): 1,024 bytes between groups of eight rows, exchange
// pattern of 128 bytes.
__device__ __forceinline__ u64 describe(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

// Descriptor of A in rows of 64 bytes at `address` (512-byte aligned, or 32 bytes on): 512 bytes between groups of eight rows, 16-byte
// chunks exchanged by half the row modulo 4.
__device__ __forceinline__ u64 describe_rows64(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)32 << 32 | (u64)2 << 62;
}
