// Attention of one tile: consecutive positions of one chunk, all heads of one KV head.
#pragma once

#include "epilogue.h"
#include "key_stream.h"
#include "plan.h"
#include "tile.h"

namespace {

// Copies one key block to floats: K as [keys][k_dims], V as panels (see accumulate). The rows up to
// the next multiple of kRows become zero, so that masked products stay finite.
template <typename T>
void pack_block(const HeadRows* rows, int64_t keys, int64_t head_dim, int64_t v_dims,
                float* k, float* v, float* row) {
  for (int64_t i = 0; i < round_up(keys, kRows); ++i) {
    if (i < keys) {
      load_row(reinterpret_cast<const T*>(rows[i].k), k + i * head_dim, head_dim);
      load_row(reinterpret_cast<const T*>(rows[i].v), row, head_dim);
    } else {
      std::memset(k + i * head_dim, 0, head_dim * sizeof(float));
      std::memset(row, 0, head_dim * sizeof(float));
    }
    for (int64_t d = head_dim; d < v_dims; ++d) row[d] = 0.0f;
    for (int64_t d = 0; d < v_dims; d += kRows)
      std::memcpy(v + d * kKeyBlock + i * kRows, row + d, kRows * sizeof(float));
  }
}

// Transposes and scales: rows[kLanes][dims] -> out[dims][stride].
VXL_INLINE void lanes_from_rows(const float* rows, int64_t dims, float scale, float* out,
                                int64_t stride) {
  int64_t d = 0;
  for (; d + kLanes <= dims; d += kLanes) {
    Vec x[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = load(rows + i * dims + d);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(out + (d + i) * stride, x[i] * splat(scale));
  }
  for (; d < dims; ++d)
    for (int i = 0; i < kLanes; ++i) out[d * stride + i] = rows[i * dims + d] * scale;
}

// Transposes back: in[dims][stride] -> rows[kLanes][dims].
VXL_INLINE void rows_from_lanes(const float* in, int64_t stride, int64_t dims, float* rows) {
  int64_t d = 0;
  for (; d + kLanes <= dims; d += kLanes) {
    Vec x[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = load(in + (d + i) * stride);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(rows + i * dims + d, x[i]);
  }
  for (; d < dims; ++d)
    for (int i = 0; i < kLanes; ++i) rows[i * dims + d] = in[d * stride + i];
}

template <typename T>
void prefill_task(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan, int64_t task,
                  float* scratch, float* workspace) {
  // The last chunks and their last tiles see the most keys. They go first, so that the threads end
  // at about the same time. The tiles of a chunk run one after another and share its K and V in the
  // processor's cache.
  const int64_t kv_head = task % p.kv_heads;
  task /= p.kv_heads;
  const int64_t batch = task % p.batch;
  task /= p.batch;
  const int64_t split = task % plan.splits;
  task /= plan.splits;
  const int64_t tile = plan.tiles - 1 - task % plan.tiles;
  const int64_t chunk = p.geometry.chunks - 1 - task / plan.tiles;

  const int64_t dims = p.head_dim, v_dims = round_up(dims, kRows), group = plan.group;
  const int64_t first = tile * plan.tile_rows;
  const int64_t rows = min_(plan.tile_rows, p.geometry.chunk_rows() - first);
  if (rows <= 0) return;
  const int64_t lanes = rows * group;
  const int64_t vecs = ceil_div(lanes, kLanes), padded = vecs * kLanes;

  const KeyStream<T> stream(p, batch, kv_head, chunk);
  const int64_t length = plan.split_length(vxl::sequence_keys(p, batch));
  const int64_t begin = split * length;
  // The keys of this split that the tile's last row sees.
  const int64_t end = min_(begin + length, stream.cached + first + rows);
  if (begin >= vxl::sequence_keys(p, batch)) return;

  auto take = [&scratch](int64_t n) { float* x = scratch; scratch += n; return x; };
  float* q = take(v_dims * padded);
  float* o = take(v_dims * padded);
  float* k_block = take(kKeyBlock * dims);
  float* v_block = take(kKeyBlock * v_dims);
  float* s = take(kKeyBlock * kCols * kLanes);
  float* m = take(padded);
  float* l = take(padded);
  float* staged = take(kLanes * v_dims);
  int32_t* limits = reinterpret_cast<int32_t*>(take(padded));

  auto row_of_lane = [&](int64_t lane) {
    return p.geometry.row_of(chunk, first + lane / group);
  };
  auto head_of_lane = [&](int64_t lane) { return kv_head * group + lane % group; };

  // Column groups of kCols vectors, the last one narrower, as panels [dims][width lanes].
  for (int64_t g = 0; g < vecs; g += kCols) {
    const int64_t width = min_(kCols, vecs - g);
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t lane = (g + j) * kLanes + i;
        if (lane < lanes) {
          load_row(static_cast<const T*>(p.q.data) + batch * p.q.batch_stride +
                       row_of_lane(lane) * p.q.row_stride + head_of_lane(lane) * p.q.head_stride,
                   staged + i * dims, dims);
        } else {
          std::memset(staged + i * dims, 0, dims * sizeof(float));
        }
      }
      lanes_from_rows(staged, dims, p.scale * kLog2e, q + g * kLanes * dims + j * kLanes,
                      width * kLanes);
    }
  }
  std::memset(o, 0, v_dims * padded * sizeof(float));
  std::memset(l, 0, padded * sizeof(float));
  for (int64_t i = 0; i < padded; ++i) m[i] = -INFINITY;

  Prefetch prefetch;
  prefetch.bytes = dims * int64_t(sizeof(T));
  stream.find(begin, max_(min_(kKeyBlock, end - begin), 0), prefetch.rows);
  for (int64_t key = begin; key < end; key += kKeyBlock) {
    const int64_t n = min_(kKeyBlock, end - key);
    pack_block<T>(prefetch.rows, n, dims, v_dims, k_block, v_block, staged);
    const int64_t n_next = max_(0, min_(kKeyBlock, end - key - kKeyBlock));
    stream.find(key + kKeyBlock, n_next, prefetch.rows);
    prefetch.plan(n_next, ceil_div(n, kRows) * ceil_div(vecs, kCols));

    int64_t lane = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t limit = int32_t(min_(n, max_(0, stream.cached + first + r + 1 - key)));
      for (int64_t g = 0; g < group; ++g) limits[lane++] = limit;
    }
    for (; lane < padded; ++lane) limits[lane] = limits[lanes - 1];

    for (int64_t g = 0; g < vecs; g += kCols) {
      const int64_t at = g * kLanes;
      const Lanes state{q + at * dims, o + at * v_dims, m + at, l + at, limits + at};
      switch (min_(kCols, vecs - g)) {
        case 1: attend_block<1>(k_block, v_block, n, dims, v_dims, state, s, prefetch); break;
        case 2: attend_block<2>(k_block, v_block, n, dims, v_dims, state, s, prefetch); break;
        default: attend_block<kCols>(k_block, v_block, n, dims, v_dims, state, s, prefetch);
      }
    }
  }

  for (int64_t v = 0; v < vecs; ++v) {
    const int64_t g = v / kCols * kCols, width = min_(kCols, vecs - g);
    rows_from_lanes(o + g * kLanes * v_dims + (v - g) * kLanes, width * kLanes, dims, staged);
    for (int64_t i = 0; i < min_(kLanes, lanes - v * kLanes); ++i) {
      const int64_t lane = v * kLanes + i;
      const Partial result{staged + i * dims, m[lane], l[lane]};
      if (plan.splits > 1) {
        save_partial(p, plan, batch, split, row_of_lane(lane), head_of_lane(lane), result,
                     workspace);
      } else {
        finish_row<T>(p, batch, row_of_lane(lane), head_of_lane(lane), result);
      }
    }
  }
}

}  // namespace
