// rope_append with new outputs and in place, for a backend that writes into given outputs.
#pragma once

#include <tuple>

#include "arguments.h"

namespace vxl::bindings {

// Takes the operator's arguments, with head_dim of q and k contiguous, then q_out and k_out, which
// may be q and k.
using RopeInto = void (*)(const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                          const Tensor& cache_seqlens, at::IntArrayRef layout,
                          const Tensor& inv_freq, const Tensor& q_out, const Tensor& k_out);

template <RopeInto into, Tensor (*empty_as)(const Tensor&)>
std::tuple<Tensor, Tensor> rope_append(const Tensor& q_in, const Tensor& k_in, const Tensor& v,
                                       const Tensor& k_cache, const Tensor& v_cache,
                                       const Tensor& block_table, const Tensor& cache_seqlens,
                                       at::IntArrayRef layout, const Tensor& inv_freq) {
  const Tensor q = rows_contiguous(q_in), k = rows_contiguous(k_in);
  Tensor q_out = empty_as(q), k_out = empty_as(k);
  into(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq, q_out, k_out);
  return {q_out, k_out};
}

template <RopeInto into, Tensor (*empty_as)(const Tensor&)>
void rope_append_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                  const Tensor& v_cache, const Tensor& block_table, const Tensor& cache_seqlens,
                  at::IntArrayRef layout, const Tensor& inv_freq) {
  if (q.stride(-1) == 1 && k.stride(-1) == 1) {
    into(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq, q, k);
  } else {
    auto [q_out, k_out] = rope_append<into, empty_as>(q, k, v, k_cache, v_cache, block_table,
                                                      cache_seqlens, layout, inv_freq);
    q.copy_(q_out);
    k.copy_(k_out);
  }
  bump_versions({&q, &k});
}

}  // namespace vxl::bindings
