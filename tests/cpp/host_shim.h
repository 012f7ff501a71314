// The part of CUDA that csrc/cuda/*.cuh use, on the CPU. A loop walks the grid and sets threadIdx
// and the like as variables. Every access is counted and checked for the alignment that a GPU
// needs. Threads run one after another, so a body with a barrier can't run here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <vector>

#include "../../csrc/cpu/simd.h"  // Bf16, F16 and their rounding
#include "../../csrc/cuda/plan.h"

#define VXL_HOST_SHIM
#define VXL_DEVICE inline

inline vxl::cuda::Extent threadIdx, blockIdx, blockDim, gridDim;

namespace vxl::cuda {

using ::Bf16;
using ::F16;
using ::from_float;
using ::to_float;
struct alignas(16) Word16 { uint32_t x, y, z, w; };
struct alignas(16) Float4 { float x, y, z, w; };

// What a launch moved. A sector is 32 bytes, the least that a GPU fetches. In one access of a warp
// each sector counts once, as the hardware merges them. Metadata (lengths, tables, frequencies) is
// counted only in sectors, since caches serve it.
struct Traffic {
  int64_t read = 0, written = 0, sectors = 0, meta_sectors = 0, widest = 0;
};
inline Traffic traffic;
inline bool count_sectors = false;

struct Access {
  uintptr_t address;
  size_t bytes;
  bool meta;
};
inline std::vector<std::vector<Access>> accesses;  // of each thread of the block, in order
inline size_t thread_in_block;

template <typename W>
inline void note(const void* p, bool meta) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(W) != 0) {
    std::printf("an access of %zu bytes at %p is not aligned\n", sizeof(W), p);
    std::abort();
  }
  if (!meta) traffic.widest = std::max<int64_t>(traffic.widest, sizeof(W));
  if (count_sectors) {
    accesses[thread_in_block].push_back({reinterpret_cast<uintptr_t>(p), sizeof(W), meta});
  }
}

template <typename W>
inline W load(const void* p) {
  note<W>(p, false);
  traffic.read += sizeof(W);
  W w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
template <typename W>
inline void store(void* p, W w) {
  note<W>(p, false);
  traffic.written += sizeof(W);
  std::memcpy(p, &w, sizeof w);
}
template <typename T>
inline T load_meta(const T* p) {
  note<T>(p, true);
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void count_block() {
  for (size_t warp = 0; warp < accesses.size(); warp += 32) {
    const size_t end = std::min(warp + 32, accesses.size());
    size_t longest = 0;
    for (size_t t = warp; t < end; ++t) longest = std::max(longest, accesses[t].size());
    for (size_t i = 0; i < longest; ++i) {
      std::set<uintptr_t> sectors[2];
      for (size_t t = warp; t < end; ++t) {
        if (i >= accesses[t].size()) continue;
        const Access& a = accesses[t][i];
        for (uintptr_t s = a.address / 32; s <= (a.address + a.bytes - 1) / 32; ++s) {
          sectors[a.meta].insert(s);
        }
      }
      traffic.sectors += static_cast<int64_t>(sectors[0].size());
      traffic.meta_sectors += static_cast<int64_t>(sectors[1].size());
    }
  }
}

// Runs body() for every thread of the plan, forwards or backwards, since the order must not matter.
template <typename Body>
void run_grid(const Plan& plan, bool backwards, const Body& body) {
  gridDim = plan.grid;
  blockDim = plan.block;
  const int64_t threads = int64_t{blockDim.x} * blockDim.y * blockDim.z;
  const int64_t blocks = int64_t{gridDim.x} * gridDim.y * gridDim.z;
  if (blocks > 0 && (threads > 256 || threads == 0 || blockDim.z > 64 || gridDim.y > 65535 ||
                     gridDim.z > 65535)) {
    std::printf("CUDA or the kernels' launch bounds refuse this grid\n");
    std::abort();
  }
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t b = backwards ? blocks - 1 - i : i;
    blockIdx = {uint32_t(b % gridDim.x), uint32_t(b / gridDim.x % gridDim.y),
                uint32_t(b / gridDim.x / gridDim.y)};
    if (count_sectors) accesses.assign(threads, {});
    for (int64_t j = 0; j < threads; ++j) {
      const int64_t t = backwards ? threads - 1 - j : j;
      threadIdx = {uint32_t(t % blockDim.x), uint32_t(t / blockDim.x % blockDim.y),
                   uint32_t(t / blockDim.x / blockDim.y)};
      thread_in_block = static_cast<size_t>(t);
      body();
    }
    if (count_sectors) count_block();
  }
}

}  // namespace vxl::cuda
