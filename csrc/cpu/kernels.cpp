#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "pieces.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vxl {

extern const CpuKernels kernels_baseline;
#if defined(__x86_64__)
extern const CpuKernels kernels_avx2;
extern const CpuKernels kernels_avx512;
extern const Bf16Kernels kernels_avx512bf16;
extern const Bf16Kernels kernels_amx;
#elif defined(__aarch64__)
extern const Bf16Kernels kernels_neonbf16;
#endif

namespace {

// From the least to the newest.
#if defined(__x86_64__)
constexpr const char* kIsas[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};
#elif defined(__aarch64__)
constexpr const char* kIsas[] = {"baseline", "neonbf16"};
#else
constexpr const char* kIsas[] = {"baseline"};
#endif
constexpr int kNewest = int(std::size(kIsas)) - 1;

// The index in kIsas that VXL_CPU_ISA names; -1 if it is not set.
int wished_isa() {
  const char* wish = std::getenv("VXL_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return -1;
  std::string names;
  for (int i = kNewest; i >= 0; --i) {
    if (std::string(wish) == kIsas[i]) return i;
    names += kIsas[i] + std::string(i > 1 ? ", " : i == 1 ? " or " : "");
  }
  throw std::invalid_argument("VXL_CPU_ISA: got " + std::string(wish) + ", expected " + names);
}

CpuKernels with_bf16(const CpuKernels& unit, const Bf16Kernels& x) {
  CpuKernels k = unit;
  k.name = x.name;
  const int bf16 = static_cast<int>(DType::bf16);
  k.tile_piece[bf16] = x.tile_piece;
  k.backward_task[bf16] = x.backward_task;
  k.linear[bf16] = x.linear;
  k.narrow_piece[bf16] = x.narrow_piece;
  k.narrow_lanes[bf16] = x.narrow_lanes;
  return k;
}

#if defined(__x86_64__)

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512bf16() {
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// Whether the processor has AMX for bf16 and the system lets this process use its tiles.
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX-BF16, AMX-TILE
  constexpr int request = 0x1023, tile_data = 18;      // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

#elif defined(__aarch64__)

bool has_neonbf16() {
#if defined(__linux__)
  constexpr unsigned long bf16 = 1ul << 14;  // HWCAP2_BF16, which older headers do not name
  return (getauxval(AT_HWCAP2) & bf16) != 0;
#else
  return false;
#endif
}

#endif

CpuKernels choose() {
  const int wish = wished_isa();
  [[maybe_unused]] const int cap = wish < 0 ? kNewest : wish;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (cap >= 4 && has_amx()) return with_bf16(kernels_avx512, kernels_amx);
  // AMD's cores do twice the work of a float32 multiply-add in a bf16 dot product. Intel's do half
  // of it, so there the unit runs only if it is asked for.
  if (cap >= 3 && has_avx512bf16() && (wish == 3 || __builtin_cpu_is("amd"))) {
    return with_bf16(kernels_avx512, kernels_avx512bf16);
  }
  if (cap >= 2 && has_avx512()) return kernels_avx512;
  // Some compilers cannot query F16C, but every CPU with AVX2 and FMA has it.
  if (cap >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return kernels_avx2;
  }
#elif defined(__aarch64__)
  if (cap >= 1 && has_neonbf16()) return with_bf16(kernels_baseline, kernels_neonbf16);
#endif
  return kernels_baseline;
}

const CpuKernels& kernels() {
  static const CpuKernels chosen = choose();
  return chosen;
}

// Aligned floats that live as long as their thread and only grow. With fresh memory a decode step
// spent a tenth of its time on page faults.
class Arena {
 public:
  float* floats(int64_t n) {
#if defined(__SANITIZE_ADDRESS__)
    const bool fits = n == size_;  // exactly, so that the sanitizer sees the first float past it
#else
    const bool fits = n <= size_;
#endif
    if (!fits) {
      block_.reset();
      size_ = 0;
      void* p = nullptr;
      if (posix_memalign(&p, 64, static_cast<size_t>(n) * sizeof(float)) != 0) {
        throw std::bad_alloc();
      }
      block_.reset(static_cast<float*>(p));
      size_ = n;
    }
    return block_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> block_;
  int64_t size_ = 0;
};

// Runs fn(task, scratch) for every task. A free thread takes the next task. If a thread throws (no
// memory for scratch), the caller gets std::bad_alloc.
template <typename Fn>
void each_task(const ThreadPool& pool, int64_t tasks, int64_t scratch_floats, const Fn& fn) {
  struct Shared {
    const Fn& fn;
    int64_t tasks, scratch_floats;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
  } shared{fn, tasks, scratch_floats};
  auto body = [](void* arg, int) {
    Shared& s = *static_cast<Shared*>(arg);
    thread_local Arena arena;
    try {
      float* scratch = arena.floats(s.scratch_floats);
      for (int64_t task; (task = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) {
        s.fn(task, scratch);
      }
    } catch (...) {
      s.failed = true;
    }
  };
  if (tasks <= 0) return;
  const int threads = tasks < pool.threads ? static_cast<int>(tasks) : pool.threads;
  if (threads <= 1) {
    body(&shared, 0);
  } else {
    pool.run(threads, body, &shared);
  }
  if (shared.failed) throw std::bad_alloc();
}

}  // namespace

const char* cpu_isa() { return kernels().name; }

void attention_cpu(const AttentionParams& p, const ThreadPool& pool) {
  const CpuKernels& k = kernels();
  const int type = static_cast<int>(p.dtype);
  const AttentionWork work =
      plan_attention(p, UnitShape{k.lanes, k.narrow_lanes[type]}, pool.threads);
  const AttentionPlan& plan = work.plan;
  thread_local Arena arena;
  float* workspace = plan.workspace_floats > 0 ? arena.floats(plan.workspace_floats) : nullptr;
  for (const std::vector<Piece>& pieces : work.pieces) {
    each_task(pool, pieces.size(), plan.scratch_floats, [&](int64_t task, float* scratch) {
      const Piece& piece = pieces[task];
      (piece.narrow ? k.narrow_piece : k.tile_piece)[type](p, plan, piece, scratch, workspace);
    });
  }
  each_task(pool, work.merges.size(), plan.scratch_floats, [&](int64_t task, float* scratch) {
    k.merge_row[type](p, plan, work.merges[task], scratch, workspace);
  });
}

void attention_backward_cpu(const AttentionBackwardParams& p, const ThreadPool& pool) {
  const CpuKernels& k = kernels();
  const AttentionParams& call = p.call;
  const int type = static_cast<int>(call.dtype);
  const BackwardPlan plan = plan_backward(call, k.lanes);
  Arena arena;  // it grows with the rows, so it is freed after the call
  float* workspace = arena.floats(plan.tasks * plan.workspace_floats(call.geometry));
  // The last segments see the most keys. They go first, so that the threads end at about the same
  // time.
  const int64_t per_segment = call.batch * call.kv_heads * plan.parts;
  each_task(pool, plan.tasks, plan.scratch_floats, [&](int64_t i, float* scratch) {
    const int64_t segment = plan.segments - 1 - i / per_segment, rest = i % per_segment;
    const int64_t sequence = rest / plan.parts;  // batch and KV head
    const int64_t task = (sequence * plan.segments + segment) * plan.parts + rest % plan.parts;
    k.backward_task[type](p, plan, task, scratch, workspace);
  });
  if (plan.tasks == 0) return;
  const int64_t chunks = call.geometry.chunks, heads = call.kv_heads;
  each_task(pool, call.batch * heads * chunks, plan.dims, [&](int64_t i, float* scratch) {
    k.sum_new_rows[type](p, plan, i / chunks / heads, i / chunks % heads, i % chunks, scratch,
                         workspace);
  });
  if (p.grad_k_cache == nullptr) return;
  each_task(pool, heads, plan.dims, [&](int64_t kv_head, float* scratch) {
    k.sum_cache[type](p, plan, kv_head, scratch, workspace);
  });
}

void rope_append_cpu(const RopeParams& p, const ThreadPool& pool) {
  const CpuKernels& k = kernels();
  std::vector<Member> tasks;
  for (int64_t b = 0; b < p.batch; ++b) {
    const ChunkGeometry& g = p.geometry_at(b);
    for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
      for (int64_t first = 0; first < g.chunk_rows(); first += k.rope_task_rows) {
        const int64_t rows = std::min(k.rope_task_rows, g.chunk_rows() - first);
        tasks.push_back({int32_t(b), int32_t(chunk), int32_t(first), int32_t(rows)});
      }
    }
  }
  each_task(pool, tasks.size(), p.head_dim, [&](int64_t task, float* scratch) {
    k.rope_rows[static_cast<int>(p.dtype)](p, tasks[task], scratch);
  });
}

void linear_cpu(const LinearParams& p, const ThreadPool& pool) {
  const LinearKernel& k = kernels().linear[static_cast<int>(p.dtype)];
  const int64_t groups = (p.rows + k.pack_rows - 1) / k.pack_rows;
  const int64_t tasks = (p.out + k.task_outs - 1) / k.task_outs;
  const int64_t group_floats = k.packed_floats(p.in), floats = groups * group_floats;
  thread_local Arena kept;
  Arena freed;  // many rows
  constexpr int64_t few = int64_t(1) << 20;
  float* packed = (floats <= few ? kept : freed).floats(floats);
  const auto pack = [&](int64_t group, float*) { k.pack(p, group, packed + group * group_floats); };
  const ThreadPool alone;  // waking threads takes longer than packing little
  each_task(floats <= few / 4 ? alone : pool, groups, 0, pack);
  each_task(pool, tasks, k.scratch_floats,
            [&](int64_t task, float* scratch) { k.task(p, task, scratch, packed); });
}

}  // namespace vxl
