// Attention of one tile: consecutive positions of a chunk, or of chunks that see the same keys,
// with all heads of one KV head.
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

// Transposes: rows[kLanes][dims] -> out[dims][stride]. It moves words of 32 bits, floats or pairs.
VXL_INLINE void lanes_from_rows(const float* rows, int64_t dims, float* out, int64_t stride) {
  int64_t d = 0;
  for (; d + kLanes <= dims; d += kLanes) {
    Vec x[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = load(rows + i * dims + d);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(out + (d + i) * stride, x[i]);
  }
  for (; d < dims; ++d)
    for (int i = 0; i < kLanes; ++i) std::memcpy(out + d * stride + i, rows + i * dims + d, 4);
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

// How `prefill_task` computes: the operands' layout, and one key block against one column group.
// This one works in float32 for every storage type. PairTile (pairs.h) has the same members.
template <typename T>
struct FloatTile {
  static constexpr int kRows = ::kRows, kCols = ::kCols;
  static constexpr int64_t kVecUnit = 1;  // a tile has a multiple of this many vectors
  struct Session {  // lives while a task runs
    Session() {}
  };

  static int64_t k_dims(int64_t head_dim) { return head_dim; }  // 32-bit words of a row of K
  static int64_t v_dims(int64_t head_dim) { return round_up(head_dim, kRows); }  // rows of O

  float scale;
  explicit FloatTile(float x) : scale(x * kLog2e) {}

  void stage_query(const T* row, int64_t head_dim, float* out) const {
    load_row(row, out, head_dim);
    for (int64_t d = 0; d < head_dim; ++d) out[d] *= scale;
  }
  static void pack_block(const HeadRows* rows, int64_t keys, int64_t head_dim, float* k, float* v,
                         float* staged, Prefetch& /*prefetch*/) {
    ::pack_block<T>(rows, keys, head_dim, v_dims(head_dim), k, v, staged);
  }
  template <int NV>
  void attend_block(const float* k, const float* v, int64_t keys, int64_t k_dims, int64_t v_dims,
                    const Lanes& lanes, float* s, Prefetch& prefetch) const {
    ::attend_block<NV>(k, v, keys, k_dims, v_dims, lanes, s, prefetch);
  }
};

// Calls fn with a column group's number of vectors as a constant.
template <typename Tile, typename Fn>
VXL_INLINE void each_width(int64_t vecs, const Fn& fn) {
  if constexpr (Tile::kVecUnit < Tile::kCols) {
    if (vecs == 1) return fn(std::integral_constant<int, 1>{});
    if (vecs == 2) return fn(std::integral_constant<int, 2>{});
  }
  fn(std::integral_constant<int, Tile::kCols>{});
}

constexpr int64_t kFewVecs = 4;  // up to here a piece waits for its keys rather than computes

template <typename T, typename Tile>
void tile_piece(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan,
                const vxl::Piece& piece, float* scratch, float* workspace) {
  constexpr int kCols = Tile::kCols;
  const int64_t dims = p.head_dim, group = plan.group;
  const int64_t k_dims = Tile::k_dims(dims), v_dims = Tile::v_dims(dims);
  const int64_t lanes = piece.rows * group, begin = piece.begin, end = piece.end;
  const int64_t vecs = round_up(ceil_div(lanes, kLanes), Tile::kVecUnit), padded = vecs * kLanes;
  const Tile math(p.scale);
  const typename Tile::Session session;
  const vxl::Member& first = plan.members[piece.member];
  const KeyStream<T> stream(p, first.sequence, piece.kv_head, first.chunk);

  auto take = [&scratch](int64_t n) { float* x = scratch; scratch += n; return x; };
  float* q = take(k_dims * padded);
  float* o = take(v_dims * padded);
  float* k_block = take(kKeyBlock * k_dims);
  float* v_block = take(kKeyBlock * v_dims);
  float* s = take(kKeyBlock * kCols * kLanes);
  float* m = take(padded);
  float* l = take(padded);
  float* staged = take(kLanes * v_dims);
  int32_t* limits = reinterpret_cast<int32_t*>(take(padded));
  TileRow* const rows = reinterpret_cast<TileRow*>(scratch);
  find_rows(p, plan, piece, rows);
  auto head_of_lane = [&](int64_t lane) { return piece.kv_head * group + lane % group; };

  // Column groups of kCols vectors, the last one narrower, as panels [dims][width lanes].
  for (int64_t g = 0; g < vecs; g += kCols) {
    const int64_t width = min_(kCols, vecs - g);
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t lane = (g + j) * kLanes + i;
        if (lane < lanes) {
          math.stage_query(row_at<const T>(p.q, rows[lane / group], head_of_lane(lane)), dims,
                           staged + i * k_dims);
        } else {
          std::memset(staged + i * k_dims, 0, k_dims * sizeof(float));
        }
      }
      lanes_from_rows(staged, k_dims, q + g * kLanes * k_dims + j * kLanes, width * kLanes);
    }
  }
  std::memset(o, 0, v_dims * padded * sizeof(float));
  std::memset(l, 0, padded * sizeof(float));
  for (int64_t i = 0; i < padded; ++i) m[i] = -INFINITY;
  if (piece.resumes) {
    for (int64_t v = 0; v < vecs; ++v) {
      const int64_t g = v / kCols * kCols, width = min_(kCols, vecs - g);
      std::memset(staged, 0, kLanes * dims * sizeof(float));
      for (int64_t i = 0; i < min_(kLanes, lanes - v * kLanes); ++i) {
        const int64_t lane = v * kLanes + i;
        const float* from = partial_at(p, plan, piece, rows[lane / group], head_of_lane(lane),
                                       workspace);
        std::memcpy(staged + i * dims, from, dims * sizeof(float));
        m[lane] = from[dims];
        l[lane] = from[dims + 1];
      }
      lanes_from_rows(staged, dims, o + g * kLanes * v_dims + (v - g) * kLanes, width * kLanes);
    }
  }

  HeadRows here[kKeyBlock];
  Prefetch prefetch;
  prefetch.bytes = dims * int64_t(sizeof(T));
  stream.find(begin, max_(min_(kKeyBlock, end - begin), 0), prefetch.rows);
  for (int64_t key = begin; key < end; key += kKeyBlock) {
    const int64_t n = min_(kKeyBlock, end - key);
    std::memcpy(here, prefetch.rows, n * sizeof(HeadRows));
    const int64_t n_next = max_(0, min_(kKeyBlock, end - key - kKeyBlock));
    stream.find(key + kKeyBlock, n_next, prefetch.rows);
    prefetch.plan(n_next, ceil_div(n, Tile::kRows) * ceil_div(vecs, kCols), vecs <= kFewVecs);
    Tile::pack_block(here, n, dims, k_block, v_block, staged, prefetch);

    int64_t lane = 0;
    for (int64_t r = 0; r < piece.rows; ++r) {
      const int32_t limit = int32_t(min_(n, max_(0, rows[r].bound - key)));
      for (int64_t g = 0; g < group; ++g) limits[lane++] = limit;
    }
    for (; lane < padded; ++lane) limits[lane] = limits[lanes - 1];

    for (int64_t g = 0; g < vecs; g += kCols) {
      const int64_t at = g * kLanes;
      const Lanes state{q + at * k_dims, o + at * v_dims, m + at, l + at, limits + at};
      each_width<Tile>(min_(kCols, vecs - g), [&](auto width) {
        math.template attend_block<decltype(width)::value>(k_block, v_block, n, k_dims, v_dims,
                                                           state, s, prefetch);
      });
    }
  }

  for (int64_t v = 0; v < vecs; ++v) {
    const int64_t g = v / kCols * kCols, width = min_(kCols, vecs - g);
    rows_from_lanes(o + g * kLanes * v_dims + (v - g) * kLanes, width * kLanes, dims, staged);
    for (int64_t i = 0; i < min_(kLanes, lanes - v * kLanes); ++i) {
      const int64_t lane = v * kLanes + i;
      leave_row<T>(p, plan, piece, rows[lane / group], head_of_lane(lane),
                   Partial{staged + i * dims, m[lane], l[lane]}, workspace);
    }
  }
}

}  // namespace
