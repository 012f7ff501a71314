// What kernel bodies need of the machine. Under nvcc that is CUDA; in tests/cpp the same bodies
// run on the CPU, where host_shim.h has defined all of this, counts every access and checks its
// alignment. Bodies touch global memory through load, store and load_meta only.
#pragma once

#include <cstdint>
#include <cstring>

#include "../include/vxl/params.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define VXL_DEVICE __device__ __forceinline__

namespace vxl::cuda {

using Bf16 = __nv_bfloat16;
using F16 = __half;
using Word16 = uint4;
using Float4 = float4;

template <typename W>
VXL_DEVICE W load(const void* p) {
  return *static_cast<const W*>(p);
}
// The intrinsic, since the compiler takes a plain 16-byte store of packed values apart (seen in
// SASS with nvcc 13.0).
template <typename W>
VXL_DEVICE void store(void* p, W w) {
  __stwb(static_cast<W*>(p), w);
}
// Lengths, tables and frequencies: small, read by many threads, written by none.
template <typename T>
VXL_DEVICE T load_meta(const T* p) {
  return __ldg(p);
}

VXL_DEVICE float to_float(float x) { return x; }
VXL_DEVICE float to_float(Bf16 x) { return __bfloat162float(x); }
VXL_DEVICE float to_float(F16 x) { return __half2float(x); }
VXL_DEVICE void from_float(float x, float* p) { *p = x; }
VXL_DEVICE void from_float(float x, Bf16* p) { *p = __float2bfloat16_rn(x); }
VXL_DEVICE void from_float(float x, F16* p) { *p = __float2half_rn(x); }

}  // namespace vxl::cuda

#elif !defined(VXL_HOST_SHIM)
#error "kernel bodies need nvcc, or tests/cpp/host_shim.h before them"
#endif

namespace vxl::cuda {

// N values of T from one word, each as wide as its type's alignment promises.
template <typename T, int N>
struct Pack {
  T x[N];
};
template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> { using type = Word16; };
template <>
struct WordOf<4> { using type = uint32_t; };
template <>
struct WordOf<2> { using type = uint16_t; };

template <typename T, int N>
VXL_DEVICE Pack<T, N> load_pack(const T* p) {
  const auto word = load<typename WordOf<N * sizeof(T)>::type>(p);
  Pack<T, N> pack;
  memcpy(pack.x, &word, sizeof word);
  return pack;
}
template <typename T, int N>
VXL_DEVICE void store_pack(T* p, const Pack<T, N>& pack) {
  typename WordOf<N * sizeof(T)>::type word;
  memcpy(&word, pack.x, sizeof word);
  store(p, word);
}

}  // namespace vxl::cuda
