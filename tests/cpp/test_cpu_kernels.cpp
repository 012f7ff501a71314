// Compares the CPU kernels with plain loops in double, without torch, under the address, undefined
// behaviour and thread sanitizers (`make sanitize`). Every tensor is an allocation of exactly its
// size, so the sanitizer sees one element too far. Cache entries that no row may read are NaN.
// VXL_CPU_ISA chooses the instruction set. Attention and gradients run in float32 and in bf16.
//
// Usage: test [CALLS [INSTRUCTION_SET]]. The second argument is the instruction set that must run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace {

using vxl::ChunkGeometry;

std::mt19937 rng(7);
int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}
float normal() { return std::normal_distribution<float>()(rng); }

void run_threads(int threads, void (*body)(void*, int), void* arg) {
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, arg, t);
  body(arg, 0);
  for (std::thread& t : others) t.join();
}

float to_float(uint16_t bits) {
  const uint32_t u = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return uint16_t(x == x ? (u + 0x7fffu + (u >> 16 & 1u)) >> 16 : 0x7fc0u);
}

// A tensor in the type of a call: the floats themselves, or an allocation of bf16.
class Stored {
 public:
  Stored(vxl::DType type, std::vector<float>& x) : type_(type), floats_(x) {
    if (type == vxl::DType::bf16) {
      for (float value : x) bits_.push_back(to_bf16(value));
    }
  }
  void* data() {
    return type_ == vxl::DType::bf16 ? static_cast<void*>(bits_.data()) : floats_.data();
  }
  void read_back() {
    for (size_t i = 0; i < bits_.size(); ++i) floats_[i] = to_float(bits_[i]);
  }

 private:
  vxl::DType type_;
  std::vector<float>& floats_;
  std::vector<uint16_t> bits_;
};

void round_all(std::vector<float>& x) {
  for (float& value : x) value = to_float(to_bf16(value));
}

constexpr double kBf16 = 1.0 / 256;  // what one rounding to bf16 changes at most

struct Call {
  int64_t batch, heads, kv_heads, dim, page_size, max_pages, rows, appended;
  ChunkGeometry geometry;
  std::vector<float> q, k, v, k_cache, v_cache, out, lse, q_out, k_out, inv_freq;
  std::vector<int32_t> table, lens;
  vxl::PagedCache cache;
  vxl::DType type = vxl::DType::f32;
  bool shared = false;  // the sequences find their first entries in the same pages

  double unit() const { return type == vxl::DType::bf16 ? kBf16 : 0.0; }

  float* entry(std::vector<float>& pages, int64_t b, int64_t i, int64_t head) {
    const int64_t page = table[b * max_pages + i / page_size];
    return &pages[((page * page_size + i % page_size) * kv_heads + head) * dim];
  }
  float* row(std::vector<float>& x, int64_t n, int64_t b, int64_t r, int64_t head) {
    return &x[((b * rows + r) * n + head) * dim];
  }
};

std::vector<float> normals(int64_t n) {
  std::vector<float> x(n);
  for (float& value : x) value = normal();
  return x;
}

Call random_call() {
  Call c;
  c.batch = pick(1, 3);
  c.kv_heads = pick(1, 3);
  c.heads = c.kv_heads * (pick(0, 1) ? 7 : pick(1, 3));
  const bool odd = pick(0, 4) == 0;  // an odd head_dim has no rotary halves: attention only
  c.dim = odd ? 2 * pick(8, 127) + 1 : 2 * pick(8, pick(0, 1) ? 40 : 128);
  c.page_size = pick(0, 1) ? 16 : pick(1, 70);
  if (pick(0, 2) == 0) {
    c.geometry = {pick(0, 1) ? pick(1, 3) : pick(1, 90), 0, 1, true};
  } else {
    const int64_t window = pick(1, 60);
    const int64_t chunks = odd ? 1 : pick(1, 3);
    c.geometry = {window, pick(1, window < 17 ? window : 17), chunks, pick(0, 1) == 1};
  }
  c.rows = c.geometry.rows();
  c.appended = c.geometry.ratio ? c.geometry.chunks * c.geometry.vsts() : c.rows;
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t most = pick(0, 4) == 0 ? 4500 : 1500;  // several splits, or one
    c.lens.push_back(static_cast<int32_t>(pick(0, 3) == 0 ? pick(500, most) : pick(0, 60)));
  }
  int64_t longest = 0;
  for (int32_t n : c.lens) longest = n > longest ? n : longest;
  c.max_pages = (longest + c.appended + c.page_size - 1) / c.page_size;
  const int64_t pages = c.batch * c.max_pages + 1;
  for (int64_t i = 0; i < c.batch * c.max_pages; ++i) {
    c.table.push_back(static_cast<int32_t>(pages - 1 - i));
  }
  c.shared = c.batch > 1 && pick(0, 1) == 0;
  for (int64_t b = 1; c.shared && b < c.batch; ++b) {
    if (pick(0, 2) != 0) c.lens[b] = c.lens[0] + static_cast<int32_t>(pick(0, 60));
    c.lens[b] = std::min<int32_t>(c.lens[b], static_cast<int32_t>(longest));
    const int64_t both = std::min(c.lens[0], c.lens[b]) / c.page_size;
    for (int64_t i = 0; i < both; ++i) c.table[b * c.max_pages + i] = c.table[i];
  }
  c.q = normals(c.batch * c.rows * c.heads * c.dim);
  c.k = normals(c.batch * c.rows * c.kv_heads * c.dim);
  c.v = normals(c.batch * c.rows * c.kv_heads * c.dim);
  // Scores that grow from the second block of keys on: sums so far are scaled down.
  const bool growing = pick(0, 2) == 0;
  for (float& x : c.q) x *= growing ? 3.0f : 1.0f;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  c.k_cache.assign(pages * c.page_size * c.kv_heads * c.dim, nan);
  c.v_cache = c.k_cache;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t i = 0; i < c.lens[b]; ++i) {
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        for (int64_t d = 0; d < c.dim; ++d) {
          c.entry(c.k_cache, b, i, h)[d] = normal() * (growing && i < 128 ? 0.1f : 1.0f);
          c.entry(c.v_cache, b, i, h)[d] = normal();
        }
      }
    }
  }
  c.out.assign(c.q.size(), nan);
  c.q_out = c.out;
  c.k_out.assign(c.k.size(), nan);
  c.lse.assign(c.batch * c.heads * c.rows, nan);
  for (int64_t i = 0; i < c.dim / 2; ++i) {
    c.inv_freq.push_back(std::pow(1e4f, -2.0f * float(i) / float(c.dim)));
  }
  c.cache.k = c.k_cache.data();
  c.cache.v = c.v_cache.data();
  const int64_t strides[3] = {c.page_size * c.kv_heads * c.dim, c.kv_heads * c.dim, c.dim};
  for (int i = 0; i < 3; ++i) c.cache.k_strides[i] = c.cache.v_strides[i] = strides[i];
  c.cache.page_size = c.page_size;
  c.cache.block_table = c.table.data();
  c.cache.block_table_stride = c.max_pages;
  c.cache.lens = c.lens.data();
  return c;
}

vxl::RowTensor tensor(void* x, int64_t rows, int64_t heads, int64_t dim) {
  return {x, rows * heads * dim, heads * dim, dim};
}
vxl::RowTensor tensor(std::vector<float>& x, int64_t rows, int64_t heads, int64_t dim) {
  return tensor(x.data(), rows, heads, dim);
}

template <typename Params>
void set_call(Params& p, Call& c) {
  p.batch = c.batch, p.heads = c.heads, p.kv_heads = c.kv_heads, p.head_dim = c.dim;
  p.geometry = c.geometry;
  p.q = tensor(c.q, c.rows, c.heads, c.dim);
  p.k = tensor(c.k, c.rows, c.kv_heads, c.dim);
  p.v = tensor(c.v, c.rows, c.kv_heads, c.dim);
  p.cache = c.cache;
}

// The inputs of a call in its type. They point into the call.
struct Inputs {
  Stored q, k, v, k_cache, v_cache;

  explicit Inputs(Call& c)
      : q(c.type, c.q), k(c.type, c.k), v(c.type, c.v), k_cache(c.type, c.k_cache),
        v_cache(c.type, c.v_cache) {}

  void set(vxl::AttentionParams& p, Call& c) {
    set_call(p, c);
    p.dtype = c.type;
    p.q.data = q.data(), p.k.data = k.data(), p.v.data = v.data();
    p.cache.k = k_cache.data(), p.cache.v = v_cache.data();
    p.scale = 1.0f / std::sqrt(float(c.dim));
  }
};

int failures = 0;
void expect_near(double actual, double expected, double tolerance, const char* what) {
  if (std::abs(actual - expected) <= tolerance) return;
  if (++failures <= 10) std::printf("%s: got %.8g, expected %.8g\n", what, actual, expected);
}

// Compares `actual` with row `x` rotated to `position`.
void check_rotated(const Call& c, const float* x, const float* actual, int64_t position,
                   const char* what) {
  const int64_t half = c.dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const double angle = float(position) * c.inv_freq[i];
    const double a = x[i], b = x[half + i], tolerance = 2e-6 * (1 + std::abs(a) + std::abs(b));
    expect_near(actual[i], a * std::cos(angle) - b * std::sin(angle), tolerance, what);
    expect_near(actual[half + i], b * std::cos(angle) + a * std::sin(angle), tolerance, what);
  }
}

void check_rope(Call& c, const vxl::ThreadPool& pool) {
  vxl::RopeParams p;
  set_call(p, c);
  p.q_out = tensor(c.q_out, c.rows, c.heads, c.dim);
  p.k_out = tensor(c.k_out, c.rows, c.kv_heads, c.dim);
  p.inv_freq = c.inv_freq.data();
  vxl::rope_append_cpu(p, pool);
  const ChunkGeometry& g = c.geometry;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
      const int64_t base = c.lens[b] + chunk * g.vsts();
      for (int64_t r = 0; r < g.chunk_rows(); ++r) {
        const int64_t row = g.row_of(chunk, r);
        const int64_t append = g.ratio ? g.vst_at(r) : r;
        for (int64_t h = 0; h < c.heads; ++h) {
          check_rotated(c, c.row(c.q, c.heads, b, row, h), c.row(c.q_out, c.heads, b, row, h),
                        base + r, "q");
        }
        for (int64_t h = 0; h < c.kv_heads; ++h) {
          const float* k = c.row(c.k, c.kv_heads, b, row, h);
          check_rotated(c, k, c.row(c.k_out, c.kv_heads, b, row, h), base + r, "k");
          if (append < 0) continue;
          check_rotated(c, k, c.entry(c.k_cache, b, base + append, h), base + append, "k_cache");
          for (int64_t d = 0; d < c.dim; ++d) {
            expect_near(c.entry(c.v_cache, b, base + append, h)[d],
                        c.row(c.v, c.kv_heads, b, row, h)[d], 0, "v_cache");
          }
        }
      }
    }
  }
}

void check_attention(Call& c, const vxl::ThreadPool& pool) {
  vxl::AttentionParams p;
  Inputs inputs(c);
  inputs.set(p, c);
  Stored out(c.type, c.out);
  p.out = tensor(out.data(), c.rows, c.heads, c.dim);
  p.lse = c.lse.data();
  vxl::attention_cpu(p, pool);
  out.read_back();
  const ChunkGeometry& g = c.geometry;
  for (int sample = 0; sample < 12; ++sample) {  // a few rows only: the loops below are slow
    const int64_t b = pick(0, c.batch - 1), chunk = pick(0, g.chunks - 1);
    const int64_t r = pick(0, g.chunk_rows() - 1), h = pick(0, c.heads - 1);
    const int64_t kv = h / (c.heads / c.kv_heads), row = g.row_of(chunk, r);
    const int64_t cached = c.lens[b] + chunk * g.vsts();
    const float* q = c.row(c.q, c.heads, b, row, h);
    std::vector<double> scores, sum(c.dim, 0.0), mass(c.dim, 0.0);
    std::vector<const float*> values;
    for (int64_t i = 0; i < cached + r + 1; ++i) {
      const int64_t new_row = i < cached ? 0 : g.row_of(chunk, i - cached);
      const float* k = i < cached ? c.entry(c.k_cache, b, i, kv)
                                  : c.row(c.k, c.kv_heads, b, new_row, kv);
      values.push_back(i < cached ? c.entry(c.v_cache, b, i, kv)
                                  : c.row(c.v, c.kv_heads, b, new_row, kv));
      double s = 0;
      for (int64_t d = 0; d < c.dim; ++d) s += double(q[d]) * k[d];
      scores.push_back(s * p.scale);
    }
    double top = scores[0], total = 0;
    for (double s : scores) top = s > top ? s : top;
    for (size_t i = 0; i < scores.size(); ++i) {
      const double w = std::exp(scores[i] - top);
      total += w;
      for (int64_t d = 0; d < c.dim; ++d) {
        sum[d] += w * values[i][d];
        mass[d] += w * std::abs(values[i][d]);
      }
    }
    for (int64_t d = 0; d < c.dim; ++d) {
      // bf16 rounds the weights and the result.
      const double tolerance = 1e-5 + 2 * c.unit() * mass[d] / total;
      expect_near(c.row(c.out, c.heads, b, row, h)[d], sum[d] / total, tolerance, "out");
    }
    expect_near(c.lse[(b * c.heads + h) * c.rows + row], top + std::log(total), 1e-5, "lse");
  }
  for (float x : c.out) {
    if (!(x == x)) ++failures;
  }
}

// The first row of a call of ordinary tokens has the same bits in a call of its own, which takes
// the kernel of few rows where the call may have taken the tile.
void check_row_alone(Call& c, const vxl::ThreadPool& pool) {
  if (c.geometry.ratio != 0) return;
  vxl::AttentionParams p;
  Inputs inputs(c);
  inputs.set(p, c);
  std::vector<float> rows(c.heads * c.dim), lse(c.heads);
  Stored out(c.type, rows);
  const int64_t b = pick(0, c.batch - 1), size = c.type == vxl::DType::bf16 ? 2 : 4;
  for (vxl::RowTensor* x : {&p.q, &p.k, &p.v}) {
    x->data = static_cast<char*>(x->data) + b * x->batch_stride * size;
  }
  p.batch = 1;
  p.geometry = {1, 0, 1, true};
  p.cache.block_table += b * c.max_pages;
  p.cache.lens += b;
  p.out = tensor(out.data(), 1, c.heads, c.dim);
  p.lse = lse.data();
  vxl::attention_cpu(p, pool);
  out.read_back();
  for (int64_t h = 0; h < c.heads; ++h) {
    const float* expected = c.row(c.out, c.heads, b, 0, h);
    for (int64_t d = 0; d < c.dim; ++d) {
      expect_near(rows[h * c.dim + d], expected[d], 0.0, "first row alone");
    }
    expect_near(lse[h], c.lse[(b * c.heads + h) * c.rows], 0.0, "its lse");
  }
}

// Checks the gradients of the call that check_attention ran, whose sequences share no page, by two
// identities over all keys of a KV head: dV sums to the sum of dO (each row of P sums to 1), and
// <dK, K> equals <dQ, Q> (the scores depend on q and k through their product alone).
void check_backward(Call& c, const vxl::ThreadPool& pool) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> grad = normals(c.q.size()), grad_lse = normals(c.lse.size());
  std::vector<float> dq(c.q.size(), nan), dk(c.k.size(), nan), dv(c.v.size(), nan);
  std::vector<float> dk_cache(c.k_cache.size(), 0.0f), dv_cache = dk_cache;
  if (c.type == vxl::DType::bf16) round_all(grad);
  vxl::AttentionBackwardParams p;
  Inputs inputs(c);
  inputs.set(p.call, c);
  Stored out(c.type, c.out), grad_out(c.type, grad), grad_q(c.type, dq), grad_k(c.type, dk);
  Stored grad_v(c.type, dv), grad_k_cache(c.type, dk_cache), grad_v_cache(c.type, dv_cache);
  p.call.out = tensor(out.data(), c.rows, c.heads, c.dim);
  p.call.lse = c.lse.data();
  p.grad_out = tensor(grad_out.data(), c.rows, c.heads, c.dim);
  p.grad_lse = grad_lse.data();
  p.grad_q = tensor(grad_q.data(), c.rows, c.heads, c.dim);
  p.grad_k = tensor(grad_k.data(), c.rows, c.kv_heads, c.dim);
  p.grad_v = tensor(grad_v.data(), c.rows, c.kv_heads, c.dim);
  p.grad_k_cache = grad_k_cache.data();
  p.grad_v_cache = grad_v_cache.data();
  for (int i = 0; i < 3; ++i) p.grad_cache_strides[i] = c.cache.k_strides[i];
  vxl::attention_backward_cpu(p, pool);
  for (Stored* x : {&grad_q, &grad_k, &grad_v, &grad_k_cache, &grad_v_cache}) x->read_back();

  const int64_t group = c.heads / c.kv_heads;
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t seen = c.lens[b] + (c.geometry.chunks - 1) * c.geometry.vsts();
    for (int64_t kv = 0; kv < c.kv_heads; ++kv) {
      std::vector<double> from_rows(c.dim, 0.0), from_keys(c.dim, 0.0), mass(c.dim, 0.0);
      double by_q = 0, by_k = 0, size = 1;
      for (int64_t r = 0; r < c.rows; ++r) {
        for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
          for (int64_t d = 0; d < c.dim; ++d) {
            from_rows[d] += c.row(grad, c.heads, b, r, h)[d];
            mass[d] += std::abs(c.row(grad, c.heads, b, r, h)[d]);
            const double term =
                double(c.row(c.q, c.heads, b, r, h)[d]) * c.row(dq, c.heads, b, r, h)[d];
            by_q += term;
            size += std::abs(term);
          }
        }
      }
      auto key = [&](const float* k, const float* k_grad, const float* v_grad) {
        for (int64_t d = 0; d < c.dim; ++d) {
          by_k += double(k[d]) * k_grad[d];
          size += std::abs(double(k[d]) * k_grad[d]);
          from_keys[d] += v_grad[d];
        }
      };
      for (int64_t r = 0; r < c.rows; ++r) {
        key(c.row(c.k, c.kv_heads, b, r, kv), c.row(dk, c.kv_heads, b, r, kv),
            c.row(dv, c.kv_heads, b, r, kv));
      }
      for (int64_t i = 0; i < seen; ++i) {
        key(c.entry(c.k_cache, b, i, kv), c.entry(dk_cache, b, i, kv), c.entry(dv_cache, b, i, kv));
      }
      const double rows = double(c.rows * group);
      for (int64_t d = 0; d < c.dim; ++d) {
        // bf16 rounds P and the result.
        const double tolerance = 4e-6 * (rows + 8) + 2 * c.unit() * mass[d];
        expect_near(from_keys[d], from_rows[d], tolerance, "sum of dV");
      }
      // bf16 rounds dS, the result, and `out`, which dS subtracts.
      const double tolerance =
          2e-6 * size + 2e-6 * rows * double(c.dim) + 3 * c.unit() * (size + rows);
      expect_near(by_k, by_q, tolerance, "<dK, K>");
    }
  }
}

// A product of few rows: each row against a plain sum, and its bits against those of the row alone.
void check_linear(vxl::DType type, const vxl::ThreadPool& pool) {
  vxl::LinearParams p;
  p.dtype = type;
  p.rows = pick(1, 40);
  p.in = pick(0, 3) ? pick(1, 90) : pick(1, 8) * 32;
  p.out = pick(0, 3) ? pick(1, 70) : pick(1, 3) * 32;
  std::vector<float> x = normals(p.rows * p.in), weight = normals(p.out * p.in);
  std::vector<float> bias = normals(p.out), y(p.rows * p.out), alone(p.rows * p.out);
  if (type == vxl::DType::bf16) {
    for (std::vector<float>* each : {&x, &weight, &bias}) round_all(*each);
  }
  Stored sx(type, x), sw(type, weight), sb(type, bias), sy(type, y), sa(type, alone);
  const int64_t size = type == vxl::DType::bf16 ? 2 : 4;
  p.x = sx.data();
  p.weight = sw.data();
  p.bias = pick(0, 1) ? sb.data() : nullptr;
  p.y = sy.data();
  p.x_row = p.weight_row = p.in;
  p.y_row = p.out;
  vxl::linear_cpu(p, pool);
  vxl::LinearParams one = p;
  one.rows = 1;
  for (int64_t r = 0; r < p.rows; ++r) {
    one.x = static_cast<const char*>(p.x) + r * p.in * size;
    one.y = static_cast<char*>(sa.data()) + r * p.out * size;
    vxl::linear_cpu(one, vxl::ThreadPool{1, run_threads});
  }
  sy.read_back();
  sa.read_back();
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t o = 0; o < p.out; ++o) {
      double sum = p.bias == nullptr ? 0.0 : bias[o], mass = std::abs(sum);
      for (int64_t k = 0; k < p.in; ++k) {
        sum += double(x[r * p.in + k]) * weight[o * p.in + k];
        mass += std::abs(double(x[r * p.in + k]) * weight[o * p.in + k]);
      }
      const double unit = type == vxl::DType::bf16 ? kBf16 : 0.0;
      const double tolerance = 1e-6 * mass + unit * std::abs(sum);
      expect_near(y[r * p.out + o], sum, tolerance, "linear");
      expect_near(y[r * p.out + o], alone[r * p.out + o], 0.0, "row alone");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 60;
  if (argc > 2 && std::strcmp(argv[2], vxl::cpu_isa()) != 0) {
    std::printf("got %s, expected %s\n", vxl::cpu_isa(), argv[2]);
    return 1;
  }
  for (int i = 0; i < calls; ++i) {
    Call c = random_call();
    const vxl::ThreadPool pool{1 + i % 3, run_threads};
    if (c.dim % 2 == 0) check_rope(c, pool);  // fills the entries that later chunks see
    check_attention(c, pool);
    check_row_alone(c, pool);
    if (!c.shared) check_backward(c, pool);
    check_linear(vxl::DType::f32, pool);
    check_linear(vxl::DType::bf16, pool);
    c.type = vxl::DType::bf16;
    for (std::vector<float>* x : {&c.q, &c.k, &c.v, &c.k_cache, &c.v_cache}) round_all(*x);
    check_attention(c, pool);
    check_row_alone(c, pool);
    if (!c.shared) check_backward(c, pool);
  }
  std::printf("%s: %d calls, %d failures\n", vxl::cpu_isa(), calls, failures);
  return failures == 0 ? 0 : 1;
}
