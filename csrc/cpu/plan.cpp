#include "plan.h"

#include <algorithm>

namespace vxl {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace

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
