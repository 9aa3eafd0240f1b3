/* C ABI of the native CPU library: plain pointers and integers, a status code, nothing throws across it. */
#ifndef SPARSE_ENGINE_H
#define SPARSE_ENGINE_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
#ifdef __cplusplus
}
#endif
#endif
