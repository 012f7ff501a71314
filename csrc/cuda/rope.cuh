// Body of the rope_append kernel, on the grid of plan_rope. A thread rotates the same N pairs in
// several heads of a row, and appends them to the cache if the layout says so. It uses no shared
// memory and no barrier. A thread itself reads all that it overwrites before it writes, so q_out
// may be q and k_out may be k.
#pragma once

#include "../include/vxl/rotary.h"
#include "device.cuh"

namespace vxl::cuda {

// Loads N floats at p, which is 16-byte aligned if N > 1.
template <int N>
VXL_DEVICE void load_floats(const float* p, float (&out)[N]) {
  if constexpr (N == 1) {
    out[0] = load_meta(p);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const Float4 four = load_meta(reinterpret_cast<const Float4*>(p + i));
      memcpy(out + i, &four, sizeof four);
    }
  }
}

template <int N>
struct Angles {
  float cos[N], sin[N];

  VXL_DEVICE Angles(int32_t position, const float* inv_freq) {
    float frequency[N];
    load_floats<N>(inv_freq, frequency);
#pragma unroll
    for (int i = 0; i < N; ++i) cos_sin(rotary_angle(position, frequency[i]), &cos[i], &sin[i]);
  }
};

// N pairs of one head: a is in its first half, b in its second.
template <typename T, int N>
struct Pairs {
  Pack<T, N> a, b;

  VXL_DEVICE static Pairs read(const T* p, int64_t half) {
    return {load_pack<T, N>(p), load_pack<T, N>(p + half)};
  }
  VXL_DEVICE void write(T* p, int64_t half) const {
    store_pack<T, N>(p, a);
    store_pack<T, N>(p + half, b);
  }
  VXL_DEVICE Pairs rotated(const Angles<N>& angles) const {
    Pairs out;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float x = to_float(a.x[i]), y = to_float(b.x[i]);
      from_float(x * angles.cos[i] - y * angles.sin[i], &out.a.x[i]);
      from_float(y * angles.cos[i] + x * angles.sin[i], &out.b.x[i]);
    }
    return out;
  }
};

VXL_DEVICE BasicGeometry<int32_t> narrow(const ChunkGeometry& g) {
  return {static_cast<int32_t>(g.window), static_cast<int32_t>(g.ratio),
          static_cast<int32_t>(g.chunks), g.split};
}

template <typename T, int N>
VXL_DEVICE void rope_append_thread(const RopeParams& p) {
  // Rows and heads are counted in 32 bits (the launcher has checked them): a 64-bit division is a
  // subroutine call, and a row needs five divisions. What is multiplied by a stride has 64 bits.
  const BasicGeometry<int32_t> g = narrow(p.geometry);
  const int32_t half = static_cast<int32_t>(p.head_dim / 2), first = threadIdx.x * N;
  const int32_t heads = static_cast<int32_t>(p.heads), kv_heads = static_cast<int32_t>(p.kv_heads);
  const int32_t group = threadIdx.y, groups = blockDim.y;
  // KV heads are dealt from the last group on, because the last groups have one query head less.
  const int32_t kv_group = groups - 1 - group;
  const int32_t call_chunks = static_cast<int32_t>(p.batch) * g.chunks;
  using P = Pairs<T, N>;

  for (int32_t call_chunk = blockIdx.y; call_chunk < call_chunks; call_chunk += gridDim.y) {
    const int32_t batch = call_chunk / g.chunks, chunk = call_chunk % g.chunks;
    const int32_t base = load_meta(p.cache.lens + batch) + chunk * g.vsts();
    for (int32_t position = blockIdx.x * blockDim.z + threadIdx.z; position < g.chunk_rows();
         position += gridDim.x * blockDim.z) {
      const int32_t row = g.row_of(chunk, position), append = g.append_index(position);
      const Angles<N> angles(base + position, p.inv_freq + first);
      auto at = [&](const RowTensor& t, int32_t head) {
        return static_cast<T*>(t.data) + batch * t.batch_stride + row * t.row_stride +
               head * t.head_stride + first;
      };

      int32_t head = group;
      for (; head + groups < heads; head += 2 * groups) {  // two heads in flight
        const P x = P::read(at(p.q, head), half), y = P::read(at(p.q, head + groups), half);
        x.rotated(angles).write(at(p.q_out, head), half);
        y.rotated(angles).write(at(p.q_out, head + groups), half);
      }
      if (head < heads) {
        P::read(at(p.q, head), half).rotated(angles).write(at(p.q_out, head), half);
      }

      if (kv_group >= kv_heads) continue;
      if (append < 0) {
        for (head = kv_group; head < kv_heads; head += groups) {
          P::read(at(p.k, head), half).rotated(angles).write(at(p.k_out, head), half);
        }
        continue;
      }
      const PagedCache& cache = p.cache;
      const int32_t entry = base + append, page_size = static_cast<int32_t>(cache.page_size);
      const int64_t page = load_meta(cache.block_table + batch * cache.block_table_stride +
                                     entry / page_size);
      const int64_t slot = entry % page_size;
      T* k = static_cast<T*>(cache.k) + page * cache.k_strides[0] + slot * cache.k_strides[1];
      T* v = static_cast<T*>(cache.v) + page * cache.v_strides[0] + slot * cache.v_strides[1];
      const Angles<N> final_angles(entry, p.inv_freq + first);
      for (head = kv_group; head < kv_heads; head += groups) {
        const P x = P::read(at(p.k, head), half), value = P::read(at(p.v, head), half);
        x.rotated(angles).write(at(p.k_out, head), half);
        x.rotated(final_angles).write(k + head * cache.k_strides[2] + first, half);
        value.write(v + head * cache.v_strides[2] + first, half);
      }
    }
  }
}

}  // namespace vxl::cuda
