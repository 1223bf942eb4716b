// Compiles the kernels of DIFFFIT_KERNELS (a header) once for each instruction set, in the namespaces difffit::avx512,
// difffit::avx2 and difffit::baseline. Every function carries its target as an attribute, so no file needs flags of its
// own and nothing outside these namespaces is compiled for a processor that may not be there. DIFFFIT_PICK(kernel)
// is the address of the version for this processor.
//
// Kernels that multiply bfloat16 as it is are in a header of their own, DIFFFIT_DOT_KERNELS, compiled in
// difffit::avx512_bf16. What else an avx512_bf16 processor runs is difffit::avx512.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#ifdef DIFFFIT_X86
#include <immintrin.h>
#endif

#define DF_INLINE DF_TARGET __attribute__((always_inline)) static inline
#define DF_KERNEL DF_TARGET __attribute__((noinline, unused)) static
#define DF_LAMBDA DF_TARGET __attribute__((always_inline))  // lambdas do not inherit the target of their function

#ifdef DIFFFIT_X86

#ifdef DIFFFIT_DOT_KERNELS
#define DF_ISA avx512_bf16
#define DF_LANES 16
#define DF_DOTS 1
#define DF_TARGET __attribute__((target("avx512bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma")))
#include "simd.h"
#include DIFFFIT_DOT_KERNELS
#undef DF_ISA
#undef DF_LANES
#undef DF_DOTS
#undef DF_TARGET
#endif

#define DF_ISA avx512
#define DF_LANES 16
#define DF_TARGET __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma")))
#include "simd.h"
#include DIFFFIT_KERNELS
#undef DF_ISA
#undef DF_LANES
#undef DF_TARGET

#define DF_ISA avx2
#define DF_LANES 8
#define DF_TARGET __attribute__((target("avx2,fma")))
#include "simd.h"
#include DIFFFIT_KERNELS
#undef DF_ISA
#undef DF_LANES
#undef DF_TARGET

#endif

#define DF_ISA baseline
#define DF_LANES 4
#define DF_TARGET
#include "simd.h"
#include DIFFFIT_KERNELS
#undef DF_ISA
#undef DF_LANES
#undef DF_TARGET

#ifdef DIFFFIT_X86
#define DIFFFIT_PICK(...)                                                \
  (::difffit::isa() >= ::difffit::Isa::avx512 ? &avx512::__VA_ARGS__     \
   : ::difffit::isa() == ::difffit::Isa::avx2 ? &avx2::__VA_ARGS__       \
                                              : &baseline::__VA_ARGS__)
#else
#define DIFFFIT_PICK(...) (&baseline::__VA_ARGS__)
#endif
