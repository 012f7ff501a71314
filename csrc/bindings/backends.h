// A call that names another backend than the kernels of a file leaves them here.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <type_traits>

namespace vxl::bindings {

// A derivative without a formula would come out as zero. Where an operator returns something,
// PyTorch itself warns when a gradient goes back through it.
template <typename R>
struct RefusesDerivatives {
  const char* op;

  void operator()(const at::Tensor& x) const {
    TORCH_CHECK_NOT_IMPLEMENTED(!x._fw_grad(0).defined(), op,
                                ": got a tensor of forward-mode AD, which only "
                                "backend='reference' serves");
    if (!std::is_void_v<R> || !at::GradMode::is_enabled()) return;
    TORCH_CHECK_NOT_IMPLEMENTED(!x.requires_grad(), op,
                                ": got a tensor that requires a gradient, expected none (or "
                                "torch.no_grad(), for inference)");
  }
  void operator()(const std::optional<at::Tensor>& x) const {
    if (x.has_value()) (*this)(*x);
  }
  template <typename T>
  void operator()(const T&) const {}
};

// fn with the schema's last argument, `backend`. "" and `own` mean fn itself. Any other name goes
// to the kernel that vxl_kernels/ops.py registers for all devices: the dispatcher keeps that one
// under the empty set of keys.
template <auto fn>
struct Named;

template <typename R, typename... Args, R (*fn)(Args...)>
struct Named<fn> {
  static inline const char* op = nullptr;
  static inline std::string_view own;

  static R call(Args... args, std::string_view backend) {
    const RefusesDerivatives<R> check{op};
    (check(args), ...);
    if (backend.empty() || backend == own) return fn(args...);
    static const auto handle = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow(op, "")
                                   .template typed<R(Args..., std::string_view)>();
    return handle.redispatch(c10::DispatchKeySet(), args..., backend);
  }
};

// Registers fn for `op`, a full name ("vxl::rope_append"). own: the backend that fn is, "" where
// callers cannot name it.
template <auto fn>
void implement(torch::Library& m, const char* op, std::string_view own) {
  Named<fn>::op = op;
  Named<fn>::own = own;
  m.impl(op, &Named<fn>::call);
}

}  // namespace vxl::bindings
