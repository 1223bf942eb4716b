// Which instruction set the kernels use on this processor: the best one it has, or another that it has and the environment
// variable DIFFFIT_FAST_CPU asks for (avx512_bf16, avx512, avx2, baseline), so that every version can be tested on one
// machine. avx512_bf16, whose products of bfloat16 were measured to be faster on processors of AMD, has to be asked for on
// others.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define DIFFFIT_X86 1
#endif

namespace difffit {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

inline Isa best_isa() {  // of what the processor has
#ifdef DIFFFIT_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// Whether this is a processor of AMD.
inline bool amd() {
#ifdef DIFFFIT_X86
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

inline Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("DIFFFIT_FAST_CPU");
  if (wanted == nullptr || *wanted == '\0') return best == Isa::avx512_bf16 && !amd() ? Isa::avx512 : best;
  const std::string name(wanted);
  Isa isa = Isa::baseline;
  if (name == "avx512_bf16") {
    isa = Isa::avx512_bf16;
  } else if (name == "avx512") {
    isa = Isa::avx512;
  } else if (name == "avx2") {
    isa = Isa::avx2;
  } else if (name != "baseline") {
    throw std::runtime_error("DIFFFIT_FAST_CPU must be avx512_bf16, avx512, avx2 or baseline; got '" + name + "'");
  }
  if (isa > best) throw std::runtime_error("DIFFFIT_FAST_CPU=" + name + ", but this processor does not have it");
  return isa;
}

inline Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

inline const char* isa_name() {
  switch (isa()) {
    case Isa::avx512_bf16: return "AVX512_BF16";
    case Isa::avx512: return "AVX512";
    case Isa::avx2: return "AVX2";
    default: return "baseline";
  }
}

}  // namespace difffit
