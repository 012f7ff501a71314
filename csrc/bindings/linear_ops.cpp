// `invariant_linear` of the CPU kernels as a torch operator.
#include <torch/library.h>

#include <optional>
#include <vector>

#include "../cpu/kernels.h"
#include "arguments.h"
#include "backends.h"
#include "threads.h"

namespace {

using at::Tensor;
using namespace vxl::bindings;

Tensor invariant_linear(const Tensor& x_in, const Tensor& weight_in,
                        const std::optional<Tensor>& bias_in) {
  TORCH_CHECK_VALUE(x_in.dim() >= 1 && weight_in.dim() == 2 && x_in.size(-1) == weight_in.size(1),
                    "weight: got shape ", weight_in.sizes(), ", expected (out_features, ",
                    x_in.dim() >= 1 ? x_in.size(-1) : 0, ") for x");
  TORCH_CHECK_VALUE(weight_in.scalar_type() == x_in.scalar_type(), "weight: got ",
                    weight_in.scalar_type(), ", expected ", x_in.scalar_type(), " as x");
  vxl::LinearParams p;
  p.dtype = dtype_of(x_in, "x");
  p.in = weight_in.size(1);
  p.out = weight_in.size(0);
  std::vector<int64_t> sizes = x_in.sizes().vec();
  sizes.back() = p.out;
  p.rows = c10::multiply_integers(sizes.begin(), sizes.end() - 1);
  const Tensor x = rows_contiguous(x_in.reshape({p.rows, p.in}));
  const Tensor weight = rows_contiguous(weight_in);
  Tensor y = at::empty({p.rows, p.out}, x.options()), bias;
  if (bias_in.has_value()) {
    TORCH_CHECK_VALUE(bias_in->dim() == 1 && bias_in->size(0) == p.out &&
                          bias_in->scalar_type() == x.scalar_type(),
                      "bias: got ", bias_in->scalar_type(), " ", bias_in->sizes(), ", expected ",
                      x.scalar_type(), " (", p.out, ",)");
    bias = bias_in->contiguous();
    p.bias = bias.const_data_ptr();
  }
  p.x = x.const_data_ptr();
  p.x_row = x.stride(0);
  p.weight = weight.const_data_ptr();
  p.weight_row = weight.stride(0);
  p.y = y.mutable_data_ptr();
  p.y_row = p.out;
  if (y.numel() > 0) vxl::linear_cpu(p, thread_pool());
  return y.view(sizes);
}

}  // namespace

TORCH_LIBRARY_IMPL(vxl, CPU, m) {
  implement<invariant_linear>(m, "vxl::invariant_linear", "cpu");
}
