// A call that names another backend than the kernels of a file leaves them here.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string_view>

namespace vxl::bindings {

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
