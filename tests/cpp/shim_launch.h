// The launchers of csrc/cuda/*.cu on the shim, with the same plans and bodies.
#pragma once

#include "host_shim.h"

#include "../../csrc/cuda/pages.cuh"
#include "../../csrc/cuda/rope.cuh"

namespace vxl::cuda {

template <typename T>
void rope_shim_as(const RopeParams& p, const Plan& plan, bool backwards) {
  run_grid(plan, backwards, [&] {
    if (plan.word == 16) {
      rope_append_thread<T, 16 / sizeof(T)>(p);
    } else {
      rope_append_thread<T, 1>(p);
    }
  });
}

inline bool rope_shim(const RopeParams& p, bool backwards) {
  const Plan plan = plan_rope(p);
  if (plan.word == 0) return false;
  switch (p.dtype) {
    case DType::f32: rope_shim_as<float>(p, plan, backwards); break;
    case DType::bf16: rope_shim_as<Bf16>(p, plan, backwards); break;
    case DType::f16: rope_shim_as<F16>(p, plan, backwards); break;
  }
  return true;
}

// Calls fn with a value of the plan's word type.
template <typename Fn>
void with_word(int bytes, const Fn& fn) {
  switch (bytes) {
    case 16: return fn(Word16{});
    case 8:
    case 4: return fn(uint32_t{});
    case 2: return fn(uint16_t{});
    default: return fn(uint8_t{});
  }
}

inline void copy_pages_shim(const PageCopyParams& p, bool backwards) {
  const Plan plan = plan_copy_pages(p);
  with_word(plan.word, [&](auto word) {
    run_grid(plan, backwards, [&] { copy_pages_thread<decltype(word)>(p); });
  });
}

template <bool kGather>
void transfer_rows_shim(const RowTransferParams& p, bool backwards) {
  const Plan plan = plan_row_transfer(p);
  with_word(plan.word, [&](auto word) {
    run_grid(plan, backwards, [&] { transfer_rows_thread<decltype(word), kGather>(p); });
  });
}

}  // namespace vxl::cuda
