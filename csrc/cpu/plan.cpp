#include "plan.h"

#include <algorithm>

namespace vxl {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Q^T and O^T of a tile fit in a 1 MiB L2 beside one key block. Larger tiles copy each key block
// less often. Share of the FMA peak at head_dim 128: 0.80 with 240 lanes, 0.84 with 336, 0.86 with
// 672.
constexpr int64_t kMaxLanes = 672;
constexpr int64_t kTileFloats = 2 * 128 * kMaxLanes;

constexpr int64_t kDecodeSplit = 512, kTileSplit = 4096;

}  // namespace

AttentionPlan plan_attention(const AttentionParams& p, int lanes, int64_t decode_rows,
                             int threads) {
  AttentionPlan plan;
  const ChunkGeometry& g = p.geometry;
  plan.group = p.heads / p.kv_heads;
  const int64_t rows = g.chunk_rows();
  const int64_t dims = round_up(p.head_dim, 32);  // AMX works on 32 values at a time
  plan.decode = g.ratio == 0 && rows * plan.group <= decode_rows;

  const bool few_rows = g.ratio == 0 && rows * plan.group <= kMaxLanes;
  plan.split_unit = plan.decode ? kDecodeSplit : few_rows ? kTileSplit : 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    plan.splits = std::max(plan.splits, plan.split_count(sequence_keys(p, b)));
  }

  // A multiple of 3 vectors fills the register tiles. A call with few tiles cuts them smaller, so
  // that the threads end at about the same time.
  const int64_t unit = 3 * lanes, spread = g.chunks * p.batch * p.kv_heads * plan.splits;
  int64_t tile_lanes = std::clamp(kTileFloats / (2 * dims) / unit * unit, unit, kMaxLanes);
  auto cut = [&] {
    plan.tile_rows = std::max<int64_t>(tile_lanes / plan.group, 1);
    plan.tiles = std::max<int64_t>(ceil_div(rows, plan.tile_rows), 1);
    plan.tile_rows = std::max<int64_t>(ceil_div(rows, plan.tiles), 1);  // even tiles
  };
  cut();
  while (tile_lanes > 4 * unit && plan.tiles * spread < 8 * int64_t(threads)) {
    tile_lanes /= 2;
    cut();
  }

  plan.tasks = plan.decode ? p.batch * plan.splits : plan.tiles * spread;
  if (g.rows() == 0) plan.tasks = 0;
  if (plan.splits > 1) {
    plan.workspace_floats = p.batch * plan.splits * g.rows() * p.heads * (p.head_dim + 2);
  }

  constexpr int64_t key_block = 128, slack = 64;
  if (plan.decode) {
    const int64_t n = round_up(rows * plan.group, 8) * p.kv_heads;
    plan.scratch_floats =
        2 * n * dims + std::max(lanes, 8) * dims + n * (key_block + 3 * lanes) + slack;
  } else {
    const int64_t n = round_up(plan.tile_rows * plan.group, 2 * lanes);
    plan.scratch_floats = 2 * n * dims + 2 * key_block * dims + key_block * unit + 3 * n +
                          lanes * dims + slack;
  }
  return plan;
}

BackwardPlan plan_backward(const AttentionParams& p, int lanes) {
  // Q, dO, dQ, P and dS of a tile fit in a 1 MiB L2 beside a key block (see backward.h).
  constexpr int64_t tile_lanes = 240, key_block = 128, min_tasks = 16, max_segments = 32;
  BackwardPlan plan;
  const ChunkGeometry& g = p.geometry;
  plan.group = p.heads / p.kv_heads;
  plan.dims = round_up(p.head_dim, 2 * lanes);
  const int64_t rows = g.chunk_rows(), unit = 3 * lanes;
  const int64_t fitting = tile_lanes * 128 / plan.dims / unit * unit;
  plan.tile_rows = std::max<int64_t>(std::clamp(fitting, unit, 2 * tile_lanes) / plan.group, 1);
  plan.tiles = std::max<int64_t>(ceil_div(rows, plan.tile_rows), 1);
  plan.tile_rows = std::max<int64_t>(ceil_div(rows, plan.tiles), 1);

  // The batch does not count here, so no bit of a sequence depends on the others.
  const int64_t spread = std::max<int64_t>(p.kv_heads, 1);
  plan.segment_chunks = ceil_div(g.chunks, std::max<int64_t>(max_segments / spread, 1));
  plan.segments = ceil_div(g.chunks, plan.segment_chunks);
  plan.parts = std::clamp<int64_t>(min_tasks / (spread * plan.segments), 1, plan.tiles);
  plan.tasks = g.rows() == 0 ? 0 : p.batch * p.kv_heads * plan.segments * plan.parts;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t cached = sequence_keys(p, b) - rows;
    plan.cached = std::max(plan.cached, cached);
  }

  // AMX works on two vectors of lanes at a time.
  const int64_t n = round_up(plan.tile_rows * plan.group, 2 * lanes);
  plan.scratch_floats = 5 * n * plan.dims +          // Q, dO, dQ by lanes; Q, dO by rows
                        2 * key_block * n +          // P and dS
                        3 * key_block * plan.dims +  // K twice, V
                        2 * key_block * unit +       // scores of a group
                        5 * n + 3 * lanes * plan.dims;
  return plan;
}

}  // namespace vxl
