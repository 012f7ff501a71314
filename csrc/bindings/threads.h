// PyTorch's threads as a ThreadPool for the CPU kernels.
#pragma once

#include <ATen/Parallel.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../cpu/kernels.h"

namespace vxl::bindings {

inline vxl::ThreadPool thread_pool() {
  vxl::ThreadPool pool;
#ifdef _OPENMP
  pool.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  pool.run = [](int threads, void (*body)(void*, int), void* arg) {
#pragma omp parallel num_threads(threads)
    body(arg, omp_get_thread_num());
  };
#endif
  return pool;
}

}  // namespace vxl::bindings
