// Gradients of attention in one pass over the pairs. P is recomputed from the LSE:
//
//   dV += P^T dO      dP = dO V^T      dS = P (dP - delta)      dQ += dS K      dK += dS^T Q
//
// where delta is dO . O of each row, minus the gradient of its LSE. A task holds a tile of query
// rows and walks the keys that they see. Three of the five products have the form of the forward
// pass (tile.h: lanes are query rows). The two that sum over query rows have head dimensions as
// lanes and keys as rows. P and dS of a tile and a key block stay in L2, so that these two can sum
// over all lanes of the tile in registers.
//
// No buffer has the size rows x keys. A task adds up the gradients of K and V in float32 in its own
// workspace. `sum_new_rows` and `sum_cache` then add the workspaces in a fixed order.
//
// Source: FlashAttention-2, section 3.1.2. It makes one pass with the same five products too, but
// sums dQ with atomic additions, whose order varies.
#pragma once

#include "prefill.h"

namespace {

constexpr int kWide = 2;  // vectors of head dimensions in a register tile of the sums over lanes

// Turns s into P = 2^(s - lse) and dp into dS = P (dp - delta). Masked lanes hold -inf in s and get
// zeros.
template <int NV>
VXL_NOINLINE void softmax_backward(float* s, float* dp, int64_t keys, const float* lse,
                                   const float* delta) {
  Vec row_lse[NV], row_delta[NV];
  for (int j = 0; j < NV; ++j) {
    row_lse[j] = load(lse + j * kLanes);
    row_delta[j] = load(delta + j * kLanes);
  }
#pragma GCC unroll 2
  for (int64_t key = 0; key < keys; ++key)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const int64_t at = (key * NV + j) * kLanes;
      const Vec p = exp2v(load(s + at) - row_lse[j]);
      store(s + at, p);
      store(dp + at, p * (load(dp + at) - row_delta[j]));
    }
}

// Column groups of a tile: group g starts at lane(g) and has lanes(g) of them.
struct Groups {
  int64_t vecs, cols;
  VXL_INLINE int64_t count() const { return ceil_div(vecs, cols); }
  VXL_INLINE int64_t lane(int64_t g) const { return g * cols * kLanes; }
  VXL_INLINE int64_t lanes(int64_t g) const { return min_(cols, vecs - g * cols) * kLanes; }
};

// sum[keys][dims] += p^T rows over all lanes of the tile. p: a panel [key block][lanes of the
// group] for each group. rows: panels [dims / (kWide lanes)][padded][kWide lanes]. Group g has
// values for the first seen[g] keys, a multiple of kRows that grows with g. A tile is summed by
// itself and then added: adding every lane to the long sum had eight times the error.
VXL_NOINLINE void add_over_lanes(const float* p, const float* rows, const Groups& groups,
                                 const int32_t* seen, int64_t dims, float* sum) {
  constexpr int64_t width = kWide * kLanes;
  const int64_t count = groups.count(), padded = groups.vecs * kLanes;
  const int64_t keys = seen[count - 1];
  for (int64_t d = 0; d < dims; d += width) {
    const float* const panel = rows + d * padded;
    int64_t first = 0;
    for (int64_t key = 0; key < keys; key += kRows) {
      while (seen[first] <= key) ++first;
      Vec acc[kRows][kWide];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j) acc[i][j] = Vec{};
      for (int64_t g = first; g < count; ++g) {
        const int64_t lane = groups.lane(g), n = groups.lanes(g);
        multiply<kWide>(p + lane * kKeyBlock + key * n, 1, n, panel + lane * width, n, acc);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j) {
          float* const to = sum + (key + i) * dims + d + j * kLanes;
          store(to, load(to) + acc[i][j]);
        }
    }
  }
}

// K and V of a key block as floats. Both are [keys][dims]; K is also in panels (see accumulate).
struct KeyBlock {
  float *k, *k_panels, *v;
};

template <typename T>
void pack_keys(const HeadRows* rows, int64_t keys, int64_t head_dim, int64_t dims,
               const KeyBlock& to) {
  for (int64_t i = 0; i < round_up(keys, kRows); ++i) {
    float *k = to.k + i * dims, *v = to.v + i * dims;
    const int64_t filled = i < keys ? head_dim : 0;
    if (i < keys) {
      load_row(reinterpret_cast<const T*>(rows[i].k), k, head_dim);
      load_row(reinterpret_cast<const T*>(rows[i].v), v, head_dim);
    }
    for (int64_t d = filled; d < dims; ++d) k[d] = v[d] = 0.0f;
    for (int64_t d = 0; d < dims; d += kRows)
      std::memcpy(to.k_panels + d * kKeyBlock + i * kRows, k + d, kRows * sizeof(float));
  }
}

// State of a tile of query rows while it walks the keys.
struct QueryTile {
  int64_t vecs = 0;
  float *q_lanes, *do_lanes, *dq_lanes;  // a panel [dims][lanes] for each group
  float *q_rows, *do_rows;               // panels for the sums over lanes
  float *p, *ds;                         // [key block][lanes] for each group
  float* scores;                         // of one group, if p and ds have another form
  float *lse, *delta;                    // lse is in base 2
  int32_t *limits, *no_limits;           // how many keys of the block each lane sees
  int32_t* seen;                         // the same for each group, rounded up to kRows

  // Takes its buffers from scratch.
  QueryTile(int64_t vectors, int64_t score_floats, int64_t dims, float*& scratch) {
    vecs = vectors;
    const int64_t padded = vecs * kLanes;
    auto take = [&scratch](int64_t n) { float* x = scratch; scratch += n; return x; };
    for (float** x : {&q_lanes, &do_lanes, &dq_lanes, &q_rows, &do_rows}) *x = take(dims * padded);
    for (float** x : {&p, &ds}) *x = take(kKeyBlock * padded);
    for (float** x : {&lse, &delta}) *x = take(padded);
    scores = take(score_floats);
    limits = reinterpret_cast<int32_t*>(take(padded));
    no_limits = reinterpret_cast<int32_t*>(take(padded));
    seen = reinterpret_cast<int32_t*>(take(padded));
    for (int64_t i = 0; i < padded; ++i) no_limits[i] = INT32_MAX;
    std::memset(dq_lanes, 0, dims * padded * sizeof(float));
  }
};

// How `backward_task` computes. This one works in float32 for every storage type. PairGradient
// (pairs_backward.h) has the same members.
template <typename T>
struct FloatGradient {
  static constexpr int kRows = ::kRows, kCols = ::kCols;
  static constexpr int64_t kVecUnit = 1, kScoreFloats = 0;
  using Session = typename FloatTile<T>::Session;

  float scale;
  int64_t part;  // of a score, as in the forward pass: dims counts padding too
  FloatGradient(float x, int64_t head_dim) : scale(x), part(score_part(head_dim)) {}
  float query_scale() const { return scale; }  // of the gradients of q that `block` adds up

  static void pack_keys(const HeadRows* rows, int64_t keys, int64_t head_dim, int64_t dims,
                        const KeyBlock& to) {
    ::pack_keys<T>(rows, keys, head_dim, dims, to);
  }

  // Vector v of the tile gets kLanes rows of q and dO, [kLanes][dims].
  void put_queries(const float* q, const float* grad, int64_t v, int64_t dims, QueryTile& t,
                   float* staged) const {
    constexpr int64_t width = kWide * kLanes;
    const int64_t padded = t.vecs * kLanes;
    for (int64_t i = 0; i < kLanes; ++i)
      for (int64_t d = 0; d < dims; d += width)
        for (int64_t j = 0; j < width; ++j) {
          const int64_t to = d * padded + (v * kLanes + i) * width + j;
          t.q_rows[to] = q[i * dims + d + j] * scale;
          t.do_rows[to] = grad[i * dims + d + j];
        }
    const int64_t g = v / kCols * kCols, stride = min_(kCols, t.vecs - g) * kLanes;
    const int64_t to = g * kLanes * dims + (v - g) * kLanes;
    for (int64_t i = 0; i < kLanes * dims; ++i) staged[i] = q[i] * (scale * kLog2e);
    lanes_from_rows(staged, dims, t.q_lanes + to, stride);
    lanes_from_rows(grad, dims, t.do_lanes + to, stride);
  }

  // One key block against one column group. Adds to dq_lanes and leaves P and dS for add_keys.
  template <int NV>
  void block(const KeyBlock& keys, int64_t padded, int64_t dims, const QueryTile& t, int64_t lane,
             Prefetch& prefetch) const {
    float unused[NV * kLanes], ones[NV * kLanes];
    for (int j = 0; j < NV; ++j) store(ones + j * kLanes, splat(1.0f));
    float *s = t.p + lane * kKeyBlock, *dp = t.ds + lane * kKeyBlock;
    scores<NV>(keys.k, padded, t.q_lanes + lane * dims, dims, part, t.limits + lane, s, unused,
               prefetch);
    scores<NV>(keys.v, padded, t.do_lanes + lane * dims, dims, part, t.no_limits + lane, dp, unused,
               prefetch);
    softmax_backward<NV>(s, dp, padded, t.lse + lane, t.delta + lane);
    accumulate<NV>(keys.k_panels, padded, dp, dims, ones, t.dq_lanes + lane * dims);
  }

  static void add_keys(const QueryTile& t, const Groups& groups, int64_t dims, float* dk,
                       float* dv) {
    add_over_lanes(t.p, t.do_rows, groups, t.seen, dims, dv);
    add_over_lanes(t.ds, t.q_rows, groups, t.seen, dims, dk);
  }
};

// Fills a tile: lane i gets row lane_row(i) of head lane_head(i).
template <typename T, typename Math, typename Row, typename Head>
void load_queries(const vxl::AttentionBackwardParams& p, int64_t batch, int64_t lanes, int64_t dims,
                  const Math& math, const Row& lane_row, const Head& lane_head, QueryTile& t,
                  float* staged) {
  const vxl::AttentionParams& call = p.call;
  auto at = [&](const vxl::RowTensor& x, int64_t lane) {
    return static_cast<const T*>(x.data) + batch * x.batch_stride + lane_row(lane) * x.row_stride +
           lane_head(lane) * x.head_stride;
  };
  float *q = staged, *grad = staged + kLanes * dims;
  for (int64_t v = 0; v < t.vecs; ++v) {
    std::memset(staged, 0, 2 * kLanes * dims * sizeof(float));
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t lane = v * kLanes + i;
      float delta = 0.0f, lse = 0.0f;
      if (lane < lanes) {
        load_row(at(call.q, lane), q + i * dims, call.head_dim);
        load_row(at(p.grad_out, lane), grad + i * dims, call.head_dim);
        const T* out = at(call.out, lane);
        for (int64_t d = 0; d < call.head_dim; ++d) delta += grad[i * dims + d] * to_float(out[d]);
        const int64_t at = call.lse_index(batch, call.heads, lane_head(lane), lane_row(lane));
        delta -= p.grad_lse[at];
        lse = call.lse[at] * kLog2e;
      }
      t.delta[lane] = delta;
      t.lse[lane] = lse;
    }
    math.put_queries(q, grad, v, dims, t, staged + 2 * kLanes * dims);
  }
}

template <typename T>
VXL_INLINE void store_row(const float* from, int64_t n, float scale, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store_from_float(to + d, load(from + d) * splat(scale));
  for (; d < n; ++d) from_float(from[d] * scale, to + d);
}

// One tile: positions [first, first + rows) of a chunk. The gradients of the keys are [keys][dims],
// in the order of the stream.
template <typename T, typename Math>
void backward_tile(const vxl::AttentionBackwardParams& p, const vxl::BackwardPlan& plan,
                   int64_t batch, int64_t kv_head, int64_t chunk, int64_t first, float* cache_dk,
                   float* cache_dv, float* new_dk, float* new_dv, float* scratch) {
  const vxl::AttentionParams& call = p.call;
  const int64_t dims = plan.dims, group = plan.group;
  const int64_t rows = min_(plan.tile_rows, call.geometry.chunk_rows() - first);
  const int64_t lanes = rows * group;
  auto row_of_lane = [&](int64_t lane) {
    return call.row_of(batch, chunk, first + lane / group);
  };
  auto head_of_lane = [&](int64_t lane) { return kv_head * group + lane % group; };

  const Math math(call.scale, call.head_dim);
  const int64_t vecs = round_up(ceil_div(lanes, kLanes), Math::kVecUnit);
  QueryTile t(vecs, Math::kScoreFloats, dims, scratch);
  const KeyBlock block{scratch, scratch + kKeyBlock * dims, scratch + 2 * kKeyBlock * dims};
  float* staged = scratch + 3 * kKeyBlock * dims;
  load_queries<T>(p, batch, lanes, dims, math, row_of_lane, head_of_lane, t, staged);

  const KeyStream<T> stream(call, batch, kv_head, chunk);
  const Groups groups{t.vecs, Math::kCols};
  Prefetch prefetch;
  prefetch.bytes = call.head_dim * int64_t(sizeof(T));
  // A block lies either in the cache or in the chunk, because their gradients are separate buffers.
  const int64_t end = stream.cached + first + rows;
  auto block_end = [&](int64_t key) {
    return min_(key + kKeyBlock, key < stream.cached ? stream.cached : end);
  };
  stream.find(0, block_end(0), prefetch.rows);
  for (int64_t key = 0, n; key < end; key += n) {
    n = block_end(key) - key;
    Math::pack_keys(prefetch.rows, n, call.head_dim, dims, block);
    const int64_t n_next = key + n < end ? block_end(key + n) - key - n : 0;
    stream.find(key + n, n_next, prefetch.rows);
    prefetch.plan(n_next, 2 * ceil_div(n, Math::kRows) * groups.count(), false);
    for (int64_t lane = 0; lane < t.vecs * kLanes; ++lane) {
      const int64_t row = min_(lane / group, rows - 1);
      t.limits[lane] = int32_t(min_(n, max_(0, stream.cached + first + row + 1 - key)));
    }
    for (int64_t g = 0; g < groups.count(); ++g) {
      const int64_t lane = groups.lane(g);
      const int64_t seen = round_up(t.limits[lane + groups.lanes(g) - 1], Math::kRows);
      t.seen[g] = int32_t(seen);
      if (seen == 0) continue;
      each_width<Math>(groups.lanes(g) / kLanes, [&](auto width) {
        math.template block<decltype(width)::value>(block, seen, dims, t, lane, prefetch);
      });
    }
    const bool cached = key < stream.cached;
    const int64_t at = (cached ? key : key - stream.cached) * dims;
    Math::add_keys(t, groups, dims, (cached ? cache_dk : new_dk) + at,
                   (cached ? cache_dv : new_dv) + at);
  }

  for (int64_t v = 0; v < t.vecs; ++v) {
    const int64_t g = v / Math::kCols, start = groups.lane(g);
    rows_from_lanes(t.dq_lanes + start * dims + v * kLanes - start, groups.lanes(g), dims, staged);
    for (int64_t i = 0; i < min_(kLanes, lanes - v * kLanes); ++i) {
      const int64_t lane = v * kLanes + i;
      T* to = static_cast<T*>(p.grad_q.data) + batch * p.grad_q.batch_stride +
              row_of_lane(lane) * p.grad_q.row_stride + head_of_lane(lane) * p.grad_q.head_stride;
      store_row(staged + i * dims, call.head_dim, math.query_scale(), to);
    }
  }
}

template <typename T, typename Math>
void backward_task(const vxl::AttentionBackwardParams& p, const vxl::BackwardPlan& plan,
                   int64_t task, float* scratch, float* workspace) {
  const vxl::ChunkGeometry& g = p.call.geometry;
  const int64_t size = plan.workspace_floats(g), keys = plan.workspace_keys(g);
  float* dk = workspace + task * size;
  float* dv = dk + keys * plan.dims;
  std::memset(dk, 0, size * sizeof(float));
  const typename Math::Session session;

  const int64_t part = task % plan.parts;
  task /= plan.parts;
  const int64_t segment = task % plan.segments;
  task /= plan.segments;
  const int64_t kv_head = task % p.call.kv_heads, batch = task / p.call.kv_heads;
  const int64_t from = segment * plan.segment_chunks;
  for (int64_t c = from; c < min_(from + plan.segment_chunks, g.chunks); ++c) {
    const int64_t new_keys = (plan.cached + (c - from) * g.chunk_rows()) * plan.dims;
    for (int64_t tile = part; tile * plan.tile_rows < g.chunk_rows(); tile += plan.parts) {
      backward_tile<T, Math>(p, plan, batch, kv_head, c, tile * plan.tile_rows, dk, dv,
                             dk + new_keys, dv + new_keys, scratch);
    }
  }
}

// Writes grad_k and grad_v of one chunk: the sum over the parts of its tiles.
template <typename T>
void sum_new_rows(const vxl::AttentionBackwardParams& p, const vxl::BackwardPlan& plan,
                  int64_t batch, int64_t kv_head, int64_t chunk, float* sum,
                  const float* workspace) {
  const vxl::ChunkGeometry& g = p.call.geometry;
  const int64_t segment = chunk / plan.segment_chunks, in_segment = chunk % plan.segment_chunks;
  const int64_t keys = plan.workspace_keys(g);
  for (int64_t position = 0; position < g.chunk_rows(); ++position) {
    const int64_t row = p.call.row_of(batch, chunk, position);
    for (int side = 0; side < 2; ++side) {
      const int64_t key = side * keys + plan.cached + in_segment * g.chunk_rows() + position;
      std::memset(sum, 0, plan.dims * sizeof(float));
      for (int64_t part = 0; part < plan.parts; ++part) {
        const float* x = workspace +
                         plan.task_of(p.call, batch, kv_head, segment, part) *
                             plan.workspace_floats(g) +
                         key * plan.dims;
        for (int64_t d = 0; d < plan.dims; d += kLanes) store(sum + d, load(sum + d) + load(x + d));
      }
      const vxl::RowTensor& to = side == 0 ? p.grad_k : p.grad_v;
      store_row(sum, p.call.head_dim, 1.0f,
                static_cast<T*>(to.data) + batch * to.batch_stride + row * to.row_stride +
                    kv_head * to.head_stride);
    }
  }
}

// Adds up the gradients of one KV head's cache entries, one sequence after another because
// sequences may share pages.
template <typename T>
void sum_cache(const vxl::AttentionBackwardParams& p, const vxl::BackwardPlan& plan,
               int64_t kv_head, float* sum, const float* workspace) {
  const vxl::ChunkGeometry& g = p.call.geometry;
  const vxl::PagedCache& c = p.call.cache;
  const int64_t keys = plan.workspace_keys(g), size = plan.workspace_floats(g);
  for (int64_t b = 0; b < p.call.batch; ++b) {
    const int64_t cached = vxl::sequence_keys(p.call, b) - g.chunk_rows();
    const float* const tasks = workspace + plan.task_of(p.call, b, kv_head, 0, 0) * size;
    for (int64_t entry = 0; entry < cached; ++entry) {
      const int64_t page = c.block_table[b * c.block_table_stride + entry / c.page_size];
      const int64_t at = page * p.grad_cache_strides[0] +
                         entry % c.page_size * p.grad_cache_strides[1] +
                         kv_head * p.grad_cache_strides[2];
      for (int side = 0; side < 2; ++side) {
        T* to = static_cast<T*>(side == 0 ? p.grad_k_cache : p.grad_v_cache) + at;
        load_row(to, sum, p.call.head_dim);
        for (int64_t d = p.call.head_dim; d < plan.dims; ++d) sum[d] = 0.0f;
        for (int64_t task = 0; task < plan.segments * plan.parts; ++task) {
          const float* x = tasks + task * size + (side * keys + entry) * plan.dims;
          for (int64_t d = 0; d < plan.dims; d += kLanes)
            store(sum + d, load(sum + d) + load(x + d));
        }
        store_row(sum, p.call.head_dim, 1.0f, to);
      }
    }
  }
}

}  // namespace
