/* C ABI of the native CPU library: plain pointers and integers in, a status code out; nothing throws across it.
 *
 * Every function may be called from several threads at once, apart from sparse_engine_set_isa.
 *
 * A packed weight W of shape (rows, columns) is read in the neutral form in which it is stored on disk:
 *
 *   values       kept weights row by row in column order, element type `dtype`, contiguous, no padding
 *   bitmask      uint8 (rows, ceil(columns / 8)), contiguous; bit j of byte b of a row is column 8b + j
 *   row_offsets  int64 (rows + 1,), where row r owns values[row_offsets[r] .. row_offsets[r + 1]);
 *                NULL when every row keeps `row_values` weights (N:M), so that row r starts at r * row_values
 *
 * Values are bf16, fp16, fp32, or quantised:
 *
 *   int8         weight = value * scale[row]; scales fp32 (rows,)
 *   int4         weight = value * scale[row, column / 128]; scales fp16 (rows, ceil(columns / 128)). Two's complement, two in a
 *                byte, the one of lower column in the low nibble; each row starts on a byte boundary, so that a row of an odd
 *                number of values ends with a nibble that is ignored. values_count and row_offsets count it as a value.
 *
 * Products with quantised weights also quantise the activations, row by row to int8 (scale = max |x| / 127), and sum in int32.
 *
 *        columns  0 1 2 3 4 5 6 7 | 8 ..          one row, 2:4
 *        W        a . . b . c d .                 values  a b c d ..
 *        bitmask  0x69 = 01101001b                (least significant bit first)
 *
 * No byte outside these arrays is read. The bitmask must agree with the values (as many bits set in a row as the row has
 * values, none behind the last column): callers check that once, when a weight is loaded.
 */
#ifndef SPARSE_ENGINE_H
#define SPARSE_ENGINE_H

#include <stdint.h>

#if defined(_WIN32)
#define SPARSE_ENGINE_API __declspec(dllexport)
#else
#define SPARSE_ENGINE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a signature or the meaning of an argument changes. */
#define SPARSE_ENGINE_ABI_VERSION 3

typedef enum {
  SPARSE_ENGINE_OK = 0,
  SPARSE_ENGINE_BAD_ARGUMENT = 1,    /* a negative size, an unknown dtype, or NULL where data is needed */
  SPARSE_ENGINE_OUT_OF_MEMORY = 2,   /* scratch for the activations could not be allocated */
  SPARSE_ENGINE_UNKNOWN_ISA = 3,     /* no instruction-set level has that name */
  SPARSE_ENGINE_UNSUPPORTED_ISA = 4, /* this processor, operating system or build lacks that level */
} sparse_engine_status;

typedef enum {
  SPARSE_ENGINE_BF16 = 0,
  SPARSE_ENGINE_FP16 = 1,
  SPARSE_ENGINE_FP32 = 2,
  SPARSE_ENGINE_INT8 = 3, /* of weights only */
  SPARSE_ENGINE_INT4 = 4, /* of weights only */
} sparse_engine_dtype;

/* SPARSE_ENGINE_ABI_VERSION of the library that is loaded. */
SPARSE_ENGINE_API int32_t sparse_engine_abi_version(void);

/* One English phrase for a status; static storage, never NULL. */
SPARSE_ENGINE_API const char* sparse_engine_status_message(int32_t status);

/* Levels that this processor, operating system and build can run, comma-separated, lowest first; static storage. */
SPARSE_ENGINE_API const char* sparse_engine_supported_isas(void);

/* The level in use: "scalar", "neon" (64-bit ARM; its int8 and int4 products are the scalar ones), "avx2" (AVX2, FMA, F16C, BMI) or
 * "avx512" (F, BW, DQ, VL, VBMI, VBMI2, VNNI, BF16 and GFNI).
 *
 * The highest supported one, unless the environment variable SPARSE_ENGINE_ISA names another when the library is first
 * used. If that names an unknown or unsupported level, this and every computing function return the status that says so.
 */
SPARSE_ENGINE_API int32_t sparse_engine_isa(const char** name);

/* Use level `name` from now on; NULL means the highest supported one. Not to be called while a product runs. */
SPARSE_ENGINE_API int32_t sparse_engine_set_isa(const char* name);

/* 1 if the processor and operating system have AMX tiles for bf16, else 0. */
SPARSE_ENGINE_API int32_t sparse_engine_has_amx_bf16(void);

/* y = x Wᵀ + bias with W packed, accumulated in fp32.
 *
 *   dtype        sparse_engine_dtype of x, bias and y: bf16, fp16 or fp32
 *   x            (m, columns), row-major, contiguous
 *   values_dtype sparse_engine_dtype of values; need not be that of x
 *   values       (values_count,) elements, see above
 *   values_count rows * row_values (of int4: rounded up to an even number), or row_offsets[rows]
 *   scales       see above; ignored unless values are int8 or int4
 *   bitmask      see above
 *   row_offsets  see above, or NULL
 *   row_values   values per row when row_offsets is NULL, else ignored
 *   group        M of N:M when row_offsets is NULL, else ignored; 0 when the row's values are not spread evenly over groups
 *   bias         (rows,), or NULL
 *   y            (m, rows), row-major, contiguous; every element is written
 *   m            activation rows, >= 0; meant for few (the weight is read from memory once, expanded once per 4 or 8 rows)
 *   threads      OpenMP threads to use at most, >= 1; ignored by a build without OpenMP
 */
SPARSE_ENGINE_API int32_t sparse_engine_linear(int32_t dtype, const void* x, int32_t values_dtype, const void* values, int64_t values_count,
                                               const void* scales, const uint8_t* bitmask, const int64_t* row_offsets, int64_t row_values,
                                               int64_t group, const void* bias, void* y, int64_t m, int64_t rows, int64_t columns,
                                               int32_t threads);

/* y = x Wᵀ + bias with W dense: row-major (rows, columns) of `weight_dtype`, which may be int8 but not int4; the other arguments
 * as for sparse_engine_linear. */
SPARSE_ENGINE_API int32_t sparse_engine_dense_linear(int32_t dtype, const void* x, int32_t weight_dtype, const void* weight,
                                                     const void* scales, const void* bias, void* y, int64_t m, int64_t rows,
                                                     int64_t columns, int32_t threads);

/* Rows row_begin .. row_end - 1 of a packed W as a dense, row-major block.
 *
 *   out_dtype    values_dtype, or SPARSE_ENGINE_FP32; any of bf16, fp16 and fp32 for int8 and int4 values
 *   out          (row_end - row_begin, columns) of out_dtype, contiguous; every element is written
 *   rest         as for sparse_engine_linear
 */
SPARSE_ENGINE_API int32_t sparse_engine_expand_tile(int32_t values_dtype, int32_t out_dtype, const void* values, int64_t values_count,
                                                    const void* scales, const uint8_t* bitmask, const int64_t* row_offsets,
                                                    int64_t row_values, int64_t group, int64_t row_begin, int64_t row_end, int64_t columns,
                                                    void* out, int32_t threads);

/* Reads `bytes` bytes from `data` once and gives their sum as 64-bit words (a tail of less than 8 bytes is skipped).
 * A benchmark's measure of read bandwidth: a product cannot take less time than this over its own bytes. */
SPARSE_ENGINE_API int32_t sparse_engine_read(const void* data, int64_t bytes, int32_t threads, uint64_t* sum);

/* Ask the system to put an array on huge pages where it lies, so that streaming over it misses the TLB less often.
 * A hint that never fails: where the system has no such call, or the memory is a file's, nothing changes.
 *   data         the array; only the whole 2 MiB pages inside it are touched
 *   bytes        its size */
SPARSE_ENGINE_API void sparse_engine_advise_huge_pages(void* data, int64_t bytes);

/* Read a byte of every page of an array, each of `threads` threads in its share of it: where memory belongs to nodes, pages that nobody
 * has touched yet come to the node of the thread that a product will have read them.
 *   data         the array
 *   bytes        its size */
SPARSE_ENGINE_API int32_t sparse_engine_touch(const void* data, int64_t bytes, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
