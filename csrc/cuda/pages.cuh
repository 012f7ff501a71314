// Bodies of the page kernels. They copy runs of rows as words, on the grids of plan.h.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace vxl::cuda {

// Copies one run. The blocks along x share it. `bytes` is a multiple of the word.
template <typename W>
VXL_DEVICE void copy_run(const char* source, char* target, int64_t bytes) {
  const int64_t words = bytes / static_cast<int64_t>(sizeof(W)), threads = blockDim.x;
  const int64_t stride = threads * kCopiesInFlight * gridDim.x;
  for (int64_t at = threads * kCopiesInFlight * blockIdx.x + threadIdx.x; at < words;
       at += stride) {
    W word[kCopiesInFlight];
#pragma unroll
    for (int i = 0; i < kCopiesInFlight; ++i) {
      const int64_t n = at + i * threads;
      if (n < words) word[i] = load<W>(source + n * int64_t{sizeof(W)});
    }
#pragma unroll
    for (int i = 0; i < kCopiesInFlight; ++i) {
      const int64_t n = at + i * threads;
      if (n < words) store(target + n * int64_t{sizeof(W)}, word[i]);
    }
  }
}

template <typename W>
VXL_DEVICE void copy_pages_thread(const PageCopyParams& p) {
  for (int64_t i = blockIdx.z; i < p.count; i += gridDim.z) {
    const int64_t source = load_meta(p.copies + 3 * i), target = load_meta(p.copies + 3 * i + 1);
    const int64_t rows = load_meta(p.copies + 3 * i + 2);
    if (rows <= 0) continue;  // an unused entry, whose pages may be out of range
    for (int64_t y = blockIdx.y; y < 2 * p.k.layers; y += gridDim.y) {
      const PagePool& c = y % 2 == 0 ? p.k : p.v;
      char* layer = c.data + y / 2 * c.layer_stride;
      copy_run<W>(layer + source * c.page_stride, layer + target * c.page_stride,
                  rows * c.row_bytes);
    }
  }
}

// The launcher has checked that a sequence has fewer than 2^31 rows, so 32 bits count them.
template <typename W, bool kGather>
VXL_DEVICE void transfer_rows_thread(const RowTransferParams& p) {
  const PagePool& c = p.pool;
  const uint32_t first = static_cast<uint32_t>(p.first);
  const uint32_t end = static_cast<uint32_t>(p.first + p.rows);
  const uint32_t page_size = static_cast<uint32_t>(c.page_size), last_page = (end - 1) / page_size;
  for (uint32_t page = first / page_size + blockIdx.y; page <= last_page; page += gridDim.y) {
    const uint32_t page_begin = page * page_size;
    const uint32_t from = page_begin > first ? page_begin : first;
    const uint32_t to = end - page_begin > page_size ? page_begin + page_size : end;
    const int64_t in_pool = load_meta(p.block_table + page) * c.page_stride +
                            (from - page_begin) * c.row_bytes;
    for (int64_t layer = blockIdx.z; layer < c.layers; layer += gridDim.z) {
      char* cached = c.data + layer * c.layer_stride + in_pool;
      char* dense = p.buffer + (layer * p.rows + from - first) * c.row_bytes;
      if (kGather) {
        copy_run<W>(cached, dense, (to - from) * c.row_bytes);
      } else {
        copy_run<W>(dense, cached, (to - from) * c.row_bytes);
      }
    }
  }
}

}  // namespace vxl::cuda
