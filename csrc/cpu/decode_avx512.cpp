// The decode step's kernels at this level; see decode_kernels.inc.
#define DECODE_KERNELS decode_avx512
#include "decode_kernels.inc"
