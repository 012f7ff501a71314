// The plan of an attention call with the lists that it points to.
#pragma once

#include <vector>

#include "plan.h"

namespace vxl {

struct UnitShape {        // of the kernels of one instruction set
  int lanes = 1;          // floats in a SIMD vector
  int narrow_lanes = 0;   // query rows of a KV head that the kernel of few rows takes
};

struct AttentionWork {
  AttentionPlan plan;
  std::vector<Member> members;
  std::vector<SequencePlan> sequences;
  std::vector<Piece> pieces[2];  // two phases, each with the longest pieces first
  std::vector<Member> merges;    // rows of sequences with several splits
};

// threads: affects how many rows a piece has, but no bit of the result.
AttentionWork plan_attention(const AttentionParams& p, const UnitShape& unit, int threads);

}  // namespace vxl
