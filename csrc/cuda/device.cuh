// What kernel bodies need from the device. nvcc gets it from CUDA. tests/cpp runs the same bodies
// on the CPU: host_shim.h defines all of this there, counts every access and checks its alignment.
// Bodies access global memory only through load, store and load_meta.
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
// An intrinsic, because nvcc 13.0 splits a plain 16-byte store of packed values (seen in SASS).
template <typename W>
VXL_DEVICE void store(void* p, W w) {
  __stwb(static_cast<W*>(p), w);
}
// For lengths, tables and frequencies: small, read by many threads, written by none.
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

// N values of T that one aligned word holds.
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
