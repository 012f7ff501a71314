// Entry points of the CPU backend. They take plain parameters, and threads from the caller.
#pragma once

#include <cstddef>

#include "../include/vxl/params.h"
#include "plan.h"

namespace vxl {

// Runs body(arg, thread) once on each of `threads` threads and waits.
struct ThreadPool {
  int threads = 1;
  void (*run)(int threads, void (*body)(void* arg, int thread), void* arg) = nullptr;
};

// Writes out and lse of every row. The caller has checked shapes, page indices and lengths.
// Sequences whose block tables name the same pages for a range of keys attend to it together.
void attention_cpu(const AttentionParams& p, const ThreadPool& pool);

// Writes the gradients of attention_cpu, of a ragged call with one sequence. Gradients of the cache
// are added to what is there.
void attention_backward_cpu(const AttentionBackwardParams& p, const ThreadPool& pool);

// Writes q_out and k_out of every row, and the cache entries of appended rows. q_out may be q, and
// k_out may be k.
void rope_append_cpu(const RopeParams& p, const ThreadPool& pool);

// Writes y. The bits of a row depend neither on the other rows nor on the number of threads.
void linear_cpu(const LinearParams& p, const ThreadPool& pool);

// The instruction set that these kernels use on this machine: "amx", "avx512bf16", "avx512", "avx2"
// or "baseline"; on aarch64 "neonbf16" or "baseline". The environment variable VXL_CPU_ISA lowers
// it, for tests and comparisons.
const char* cpu_isa();

using PieceTask = void (*)(const AttentionParams&, const AttentionPlan&, const Piece&,
                           float* scratch, float* workspace);
using BackwardTask = void (*)(const AttentionBackwardParams&, const BackwardPlan&, int64_t task,
                              float* scratch, float* workspace);

// A product of few rows. x is packed, some rows at a time, then every task takes some outputs of
// all rows.
struct LinearKernel {
  int64_t pack_rows;  // rows that are packed together
  int64_t task_outs;  // outputs of a task
  int64_t scratch_floats;
  int64_t (*packed_floats)(int64_t in);  // of rows that are packed together
  void (*pack)(const LinearParams&, int64_t group, float* packed);
  void (*task)(const LinearParams&, int64_t task, float* scratch, const float* packed);
};

// The kernels of one instruction set. Each ISA unit defines one table.
struct CpuKernels {
  const char* name;
  int lanes;
  PieceTask tile_piece[3], narrow_piece[3];  // by DType
  void (*merge_row[3])(const AttentionParams&, const AttentionPlan&, const Member& row,
                       float* scratch, float* workspace);
  BackwardTask backward_task[3];
  void (*sum_new_rows[3])(const AttentionBackwardParams&, const BackwardPlan&, int64_t batch,
                          int64_t kv_head, int64_t chunk, float* scratch, const float* workspace);
  void (*sum_cache[3])(const AttentionBackwardParams&, const BackwardPlan&, int64_t kv_head,
                       float* scratch, const float* workspace);
  void (*rope_rows[3])(const RopeParams&, const Member& rows, float* scratch);
  int64_t rope_task_rows;  // rows of a rope task
  LinearKernel linear[3];  // by DType
  int narrow_lanes[3];     // query rows of a KV head that narrow_piece takes; by DType
};

// Kernels for bf16 that an instruction set adds to those of AVX-512, or of the baseline on aarch64.
struct Bf16Kernels {
  const char* name;
  PieceTask tile_piece;
  PieceTask narrow_piece;
  int narrow_lanes;  // 0 if there is no narrow_piece
  BackwardTask backward_task;
  LinearKernel linear;
};

}  // namespace vxl
