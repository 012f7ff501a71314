// Runs the bodies of the CUDA kernels on the CPU (host_shim.h) under sanitizers (`make
// cuda-check`). Compares them with plain loops and with the CPU kernels. Every buffer has random
// bytes around it, and gaps between rows, heads and pages. All of these must stay unchanged.
//   test_cuda_kernels [calls]     random calls
//   test_cuda_kernels --traffic   counts the bytes moved and compares them with the least possible
#include "shim_launch.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <thread>

#include "../../csrc/cpu/pages.h"

namespace {

using vxl::ChunkGeometry;
using vxl::DType;
using vxl::cuda::traffic;

std::mt19937_64 rng(11);
int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}
bool coin() { return pick(0, 1) == 1; }
float normal() { return std::normal_distribution<float>()(rng); }

int failures = 0;
void fail(const char* what, double actual, double expected) {
  if (++failures <= 10) std::printf("%s: got %.9g, expected %.9g\n", what, actual, expected);
}
void expect(bool good, const char* what) {
  if (!good) fail(what, 0, 1);
}

void run_threads(int threads, void (*body)(void*, int), void* arg) {
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, arg, t);
  body(arg, 0);
  for (std::thread& t : others) t.join();
}
vxl::ThreadPool cpu_threads(int low = 1) {
  return {static_cast<int>(pick(low, 3)), run_threads};
}

// `size` bytes that start `misaligned` bytes after a 64-byte border, with random bytes around them.
struct Buffer {
  static constexpr int64_t kMargin = 48;
  std::vector<char> bytes;
  int64_t offset = 0, size = 0;

  Buffer() = default;
  Buffer(int64_t n, int64_t misaligned) : bytes(n + 2 * kMargin + 64), size(n) {
    for (size_t i = 0; i < bytes.size(); i += 8) {
      const uint64_t random = rng();
      std::memcpy(&bytes[i], &random, std::min<size_t>(8, bytes.size() - i));
    }
    align(misaligned);
  }
  Buffer(const Buffer& other) { *this = other; }
  Buffer& operator=(const Buffer& other) {  // at the same distance from a border
    const int64_t misaligned = other.bytes.empty() ? 0 : vxl::cuda::address(other.data()) % 64;
    bytes.assign(other.bytes.size(), 0);
    size = other.size;
    if (!bytes.empty()) align(misaligned);
    if (!bytes.empty()) std::copy(other.whole(), other.whole() + extent(), whole());
    return *this;
  }
  void align(int64_t misaligned) {
    offset = kMargin;
    while (vxl::cuda::address(bytes.data() + offset) % 64 != misaligned) ++offset;
  }
  char* data() { return bytes.data() + offset; }
  const char* data() const { return bytes.data() + offset; }
  char* whole() { return data() - kMargin; }
  const char* whole() const { return data() - kMargin; }
  int64_t extent() const { return size + 2 * kMargin; }
  bool operator==(const Buffer& other) const {
    return extent() == other.extent() && std::equal(whole(), whole() + extent(), other.whole());
  }
};

// A tensor with gaps: dims and element strides, the last dimension dense.
template <typename T>
struct Strided {
  Buffer buffer;
  std::vector<int64_t> dims, strides;

  Strided() = default;
  Strided(std::vector<int64_t> d, int64_t gap, int64_t misaligned) : dims(std::move(d)) {
    strides.assign(dims.size(), 1);
    for (size_t i = dims.size() - 1; i-- > 0;) strides[i] = strides[i + 1] * dims[i + 1] + gap;
    buffer = Buffer((strides[0] * dims[0]) * int64_t{sizeof(T)}, misaligned);
    for (int64_t i = 0; i < strides[0] * dims[0]; ++i) from_float(normal(), at_offset(i));
  }
  T* at_offset(int64_t i) { return reinterpret_cast<T*>(buffer.data()) + i; }
  T* at(int64_t a, int64_t b, int64_t c) {
    return at_offset(a * strides[0] + b * strides[1] + c * strides[2]);
  }
  vxl::RowTensor rows() { return {at_offset(0), strides[0], strides[1], strides[2]}; }
};

template <typename T>
struct RopeCall {
  int64_t batch, heads, kv_heads, dim, page_size, max_pages, pages;
  ChunkGeometry g;
  Strided<T> q, k, v, q_out, k_out, k_cache, v_cache;
  Buffer inv_freq;
  std::vector<int32_t> table, lens;

  const float* frequencies() const { return reinterpret_cast<const float*>(inv_freq.data()); }

  vxl::RopeParams params(bool inplace) {
    vxl::RopeParams p;
    p.dtype = sizeof(T) == 4 ? DType::f32 : std::is_same_v<T, Bf16> ? DType::bf16 : DType::f16;
    p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.head_dim = dim;
    p.geometry = g;
    p.q = q.rows(), p.k = k.rows(), p.v = v.rows();
    p.q_out = inplace ? p.q : q_out.rows();
    p.k_out = inplace ? p.k : k_out.rows();
    p.cache.k = k_cache.at_offset(0), p.cache.v = v_cache.at_offset(0);
    for (int i = 0; i < 3; ++i) {
      p.cache.k_strides[i] = k_cache.strides[i];
      p.cache.v_strides[i] = v_cache.strides[i];
    }
    p.cache.page_size = page_size;
    p.cache.block_table = table.data(), p.cache.block_table_stride = max_pages;
    p.cache.lens = lens.data();
    p.inv_freq = frequencies();
    return p;
  }
};

template <typename T>
RopeCall<T> rope_call(int64_t batch, int64_t heads, int64_t kv_heads, int64_t dim,
                      int64_t page_size, ChunkGeometry g, std::vector<int32_t> lens,
                      int64_t gap = 0, int64_t misaligned = 0, int odd_one = -1) {
  RopeCall<T> c;
  c.batch = batch, c.heads = heads, c.kv_heads = kv_heads, c.dim = dim, c.page_size = page_size;
  c.g = g, c.lens = std::move(lens);
  const int64_t rows = g.rows(), appended = g.ratio == 0 ? rows : g.chunks * g.vsts();
  int64_t longest = 0;
  for (int32_t n : c.lens) longest = n > longest ? n : longest;
  // A long cache would need much memory. Its entries share one page, which no new row reaches.
  const int64_t used = (longest + appended + page_size - 1) / page_size;
  c.max_pages = used;
  const int64_t first_used = longest / page_size;  // such calls have sequences of one length
  const int64_t each = used < 4096 ? used : used - first_used + 1;
  c.pages = batch * each + 1;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < used; ++i) {
      const int64_t slot = used < 4096 ? i : (i < first_used ? 0 : i - first_used + 1);
      c.table.push_back(static_cast<int32_t>(c.pages - 1 - (b * each + slot)));
    }
  }
  int made = 0;
  auto make = [&](int64_t a, int64_t b, int64_t n) {  // gap and misalignment: of one or of all
    const bool plain = odd_one >= 0 && odd_one != made++;
    return Strided<T>({a, b, n, dim}, plain ? 0 : gap, plain ? 0 : misaligned);
  };
  c.q = make(batch, rows, heads);
  c.q_out = make(batch, rows, heads);
  c.k = make(batch, rows, kv_heads);
  c.k_out = make(batch, rows, kv_heads);
  c.v = make(batch, rows, kv_heads);
  c.k_cache = make(c.pages, page_size, kv_heads);
  c.v_cache = make(c.pages, page_size, kv_heads);
  c.inv_freq = Buffer(dim / 2 * 4, odd_one == 7 ? 4 : 0);
  for (int64_t i = 0; i < dim / 2; ++i) {
    const float f = std::pow(1e6f, -2.0f * float(i) / float(dim));
    std::memcpy(c.inv_freq.data() + 4 * i, &f, 4);
  }
  return c;
}

// Compares `actual` with x rotated to `position` in double. Then copies `actual` to `expected`, so
// that whole buffers can be compared.
template <typename T>
void check_rotated(const RopeCall<T>& c, const T* x, const T* actual, T* expected,
                   int64_t position, const char* what) {
  const int64_t half = c.dim / 2;
  const double unit = sizeof(T) == 4 ? 0x1p-24 : std::is_same_v<T, Bf16> ? 0x1p-8 : 0x1p-11;
  for (int64_t i = 0; i < half; ++i) {
    const double angle = float(position) * c.frequencies()[i];
    const double a = to_float(x[i]), b = to_float(x[half + i]);
    const double slack = 3e-7 * (std::abs(a) + std::abs(b)) + 0x1p-25;  // half's smallest step
    const double want[2] = {a * std::cos(angle) - b * std::sin(angle),
                            b * std::cos(angle) + a * std::sin(angle)};
    const double got[2] = {to_float(actual[i]), to_float(actual[half + i])};
    for (int j = 0; j < 2; ++j) {
      if (!(std::abs(got[j] - want[j]) <= unit * std::abs(want[j]) + slack)) {
        fail(what, got[j], want[j]);
      }
    }
  }
  std::memcpy(expected, actual, c.dim * sizeof(T));
}

template <typename T>
void check_rope(RopeCall<T>& before, bool backwards) {
  RopeCall<T> c = before, want = before;
  if (!vxl::cuda::rope_shim(c.params(false), backwards)) return fail("rope refused", 0, 1);
  const ChunkGeometry& g = c.g;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
      const int64_t base = c.lens[b] + chunk * g.vsts();
      for (int64_t r = 0; r < g.chunk_rows(); ++r) {
        // Written out here, so that it also tests row_of and append_index.
        int64_t row = r, append = r;
        if (g.ratio > 0) {
          const int64_t group = r / (g.ratio + 1);
          append = r % (g.ratio + 1) == g.ratio ? group : -1;
          if (!g.split) {
            row = chunk * g.chunk_rows() + r;
          } else if (append >= 0) {
            row = g.chunks * g.window + chunk * g.vsts() + append;
          } else {
            row = chunk * g.window + r - group;
          }
        }
        for (int64_t h = 0; h < c.heads; ++h) {
          check_rotated(c, c.q.at(b, row, h), c.q_out.at(b, row, h), want.q_out.at(b, row, h),
                        base + r, "q");
        }
        for (int64_t h = 0; h < c.kv_heads; ++h) {
          const T* k = c.k.at(b, row, h);
          check_rotated(c, k, c.k_out.at(b, row, h), want.k_out.at(b, row, h), base + r, "k");
          if (append < 0) continue;
          const int64_t entry = base + append, slot = entry % c.page_size;
          const int64_t page = c.table[b * c.max_pages + entry / c.page_size];
          check_rotated(c, k, c.k_cache.at(page, slot, h), want.k_cache.at(page, slot, h), entry,
                        "k_cache");
          std::memcpy(want.v_cache.at(page, slot, h), c.v.at(b, row, h), c.dim * sizeof(T));
        }
      }
    }
  }
  // Inputs, gaps, margins and other cache entries are unchanged. V is equal to the bit.
  expect(c.q.buffer == before.q.buffer && c.k.buffer == before.k.buffer &&
             c.v.buffer == before.v.buffer, "inputs changed");
  expect(c.q_out.buffer == want.q_out.buffer && c.k_out.buffer == want.k_out.buffer,
         "written outside of q_out, k_out");
  expect(c.k_cache.buffer == want.k_cache.buffer, "written outside of k_cache");
  expect(c.v_cache.buffer == want.v_cache.buffer, "v_cache");

  RopeCall<T> same = before;
  vxl::cuda::rope_shim(same.params(true), !backwards);
  expect(same.k_cache.buffer == c.k_cache.buffer && same.v_cache.buffer == c.v_cache.buffer,
         "in place: cache");
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t row = 0; row < g.rows(); ++row) {
      for (int64_t h = 0; h < c.heads; ++h) {
        expect(!std::memcmp(same.q.at(b, row, h), c.q_out.at(b, row, h), c.dim * sizeof(T)),
               "in place: q");
      }
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        expect(!std::memcmp(same.k.at(b, row, h), c.k_out.at(b, row, h), c.dim * sizeof(T)),
               "in place: k");
      }
    }
  }
}

// Compares with the CPU kernel on the same call, to the last bit or so.
template <typename T>
void check_against_cpu(RopeCall<T>& before) {
  RopeCall<T> ours = before, cpu = before;
  vxl::cuda::rope_shim(ours.params(false), false);
  vxl::rope_append_cpu(cpu.params(false), cpu_threads());
  const double unit = sizeof(T) == 4 ? 0x1p-23 : std::is_same_v<T, Bf16> ? 0x1p-7 : 0x1p-10;
  auto close = [&](Strided<T>& x, Strided<T>& y, const char* what) {
    for (int64_t i = 0; i < x.strides[0] * x.dims[0]; ++i) {
      const double a = to_float(*x.at_offset(i)), b = to_float(*y.at_offset(i));
      if (!(std::abs(a - b) <= unit * std::abs(b) + 3e-6)) fail(what, a, b);
    }
  };
  close(ours.q_out, cpu.q_out, "q of the CPU kernel");
  close(ours.k_out, cpu.k_out, "k of the CPU kernel");
  close(ours.k_cache, cpu.k_cache, "k_cache of the CPU kernel");
  expect(ours.v_cache.buffer == cpu.v_cache.buffer, "v_cache of the CPU kernel");
}

int vector_calls = 0, scalar_calls = 0;

template <typename T>
void random_rope() {
  const bool wide = coin();  // everything is on 16-byte borders
  const int64_t per_word = 16 / int64_t{sizeof(T)};
  const int64_t kv_heads = pick(1, 3), heads = kv_heads * (coin() ? 7 : pick(1, 3));
  int64_t dim = 2 * pick(1, 70), gap = pick(0, 9), misaligned = sizeof(T) * pick(0, per_word - 1);
  if (wide) {
    dim = 2 * per_word * pick(1, 64 / per_word), gap = per_word * pick(0, 2), misaligned = 0;
  }
  ChunkGeometry g{pick(1, 40), 0, 1, true};
  if (pick(0, 3) > 0) {
    const int64_t window = pick(1, 50);
    g = {window, pick(1, window < 17 ? window : 17), pick(1, 3), coin()};
  }
  std::vector<int32_t> lens;
  for (int64_t b = pick(1, 3); b > 0; --b) lens.push_back(static_cast<int32_t>(pick(0, 200)));
  const int64_t page_size = coin() ? 16 : pick(1, 70);
  auto c = rope_call<T>(int64_t(lens.size()), heads, kv_heads, dim, page_size, g, lens, gap,
                        misaligned);
  const int word = vxl::cuda::plan_rope(c.params(false)).word;
  ++(word == 16 ? vector_calls : scalar_calls);
  expect(!wide || word == 16, "an aligned call took the narrow path");
  check_rope(c, coin());
  check_against_cpu(c);
}

void check_angles() {
  auto one = [](float angle) {
    float c, s;
    vxl::cos_sin(angle, &c, &s);
    const double error = std::max(std::abs(c - std::cos(double(angle))),
                                  std::abs(s - std::sin(double(angle))));
    if (!(error < 1.2e-7)) fail("angle", angle, error);
  };
  for (int i = 0; i < 100000; ++i) {
    one(std::ldexp(float(pick(-(1 << 24), 1 << 24)), int(pick(-40, 7))));  // below 2^31
    one(float(1.5707963267948966 * double(pick(0, int64_t{1} << 30))));    // sin or cos is small
  }
  for (float angle : {0.0f, -0.0f, 1e-30f, 2147483520.0f, -2147483520.0f}) one(angle);
}

// One tensor alone is off the 16-byte borders, by its base or by its strides.
template <typename T>
void check_odd_ones() {
  const int64_t per_word = 16 / int64_t{sizeof(T)};
  for (int one = 0; one < 8; ++one) {
    for (int64_t gap : {int64_t{0}, per_word / 2}) {
      auto c = rope_call<T>(2, 4, 2, 4 * per_word, 8, {9, 4, 2, one % 2 == 0}, {3, 11}, gap,
                            gap == 0 ? int64_t{sizeof(T)} : 0, one);
      const bool odd = one < 7 || vxl::cuda::address(c.frequencies()) % 16 != 0;
      const bool vector = vxl::cuda::plan_rope(c.params(false)).word == 16;
      expect(vector != odd, "the access width of a call with one misaligned tensor");
      check_rope(c, coin());
    }
  }
}

// Counts over a grid's limits in y and z, large positions, empty calls and refusals.
void check_extremes() {
  auto many = rope_call<float>(1, 1, 1, 2, 4, {1, 1, 70000, false}, {3});
  check_rope(many, false);
  auto batch = rope_call<F16>(2, 7, 1, 128, 64, {5, 0, 1, true}, {1 << 20, 1 << 20});
  check_rope(batch, true);
  auto deep = rope_call<Bf16>(1, 3, 1, 512, 16, {9, 4, 2, true}, {0}, 8, 0);
  check_rope(deep, false);
  auto odd = rope_call<float>(1, 1, 1, 6, 4, {1, 0, 1, true}, {0});
  odd.dim = 5;
  expect(!vxl::cuda::rope_shim(odd.params(false), false), "an odd head_dim was served");
  odd.dim = 1026;
  expect(!vxl::cuda::rope_shim(odd.params(false), false), "a huge head_dim was served");
  odd.dim = 6, odd.batch = 0;
  expect(vxl::cuda::plan_rope(odd.params(false)).grid.x == 0, "an empty batch has a grid");
  vxl::RowTransferParams rows;
  rows.first = INT32_MAX, rows.rows = 1;
  expect(vxl::cuda::plan_row_transfer(rows).word == 0, "a row beyond 2^31 - 1 was served");
}

// ---- pages -----------------------------------------------------------------------------------

struct Pool {
  Buffer buffer;
  vxl::PagePool pool;

  Pool(int64_t layers, int64_t pages, int64_t page_size, int64_t row_bytes, int64_t gap,
       int64_t misaligned) {
    const int64_t page = page_size * row_bytes + gap, layer = pages * page + gap;
    buffer = Buffer(layers * layer, misaligned);
    pool = {nullptr, layers, page_size, row_bytes, layer, page};
  }
  vxl::PagePool at() {
    vxl::PagePool p = pool;
    p.data = buffer.data();
    return p;
  }
  char* row(int64_t layer, int64_t page, int64_t slot) {
    return buffer.data() + layer * pool.layer_stride + page * pool.page_stride +
           slot * pool.row_bytes;
  }
};

void random_pages(int64_t pages, int64_t page_size, int64_t row_bytes, int64_t unit,
                  int threads = 1) {
  const int64_t layers = threads > 1 ? 2 : pick(1, 3);
  const int64_t gap = unit * pick(0, 2), misaligned = unit < 16 ? unit * pick(0, 16 / unit - 1) : 0;
  Pool k(layers, pages, page_size, row_bytes, gap, misaligned);
  Pool v(layers, pages, page_size, row_bytes, unit * pick(0, 2), misaligned);
  std::vector<int32_t> order(pages);
  for (int64_t i = 0; i < pages; ++i) order[i] = static_cast<int32_t>(i);
  std::shuffle(order.begin(), order.end(), rng);

  std::vector<int32_t> copies;
  Pool want_k = k, want_v = v;
  const int64_t targets = pages / 2;
  for (int64_t i = 0; i < targets; ++i) {
    const int32_t source = order[pick(targets, pages - 1)], target = order[i];
    const int32_t rows = static_cast<int32_t>(pick(0, page_size));
    copies.insert(copies.end(), {source, target, rows});
    if (rows == 0) copies[copies.size() - 3] = copies[copies.size() - 2] = -7;  // unused
    for (int64_t layer = 0; layer < layers; ++layer) {
      for (Pool* p : {&want_k, &want_v}) {
        std::memcpy(p->row(layer, target, 0), p->row(layer, source, 0), rows * row_bytes);
      }
    }
  }
  Pool cpu_k = k, cpu_v = v;
  const int64_t count = int64_t(copies.size()) / 3;
  vxl::cuda::copy_pages_shim({k.at(), v.at(), copies.data(), count}, coin());
  vxl::copy_pages_cpu({cpu_k.at(), cpu_v.at(), copies.data(), count}, cpu_threads(threads));
  expect(k.buffer == want_k.buffer && v.buffer == want_v.buffer, "copy_pages");
  expect(cpu_k.buffer == want_k.buffer && cpu_v.buffer == want_v.buffer, "copy_pages on the CPU");

  // Gather rows of a sequence that spans all pages, and scatter other rows.
  const int64_t first = pick(0, pages * page_size), rows = pick(0, pages * page_size - first);
  Buffer dense(layers * rows * row_bytes, misaligned), want = dense, cpu = dense;
  Pool want_back = k;
  Buffer others(dense.size, misaligned);
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (layer * rows + i) * row_bytes, r = first + i;
      std::memcpy(want.data() + at, k.row(layer, order[r / page_size], r % page_size), row_bytes);
      std::memcpy(want_back.row(layer, order[r / page_size], r % page_size), others.data() + at,
                  row_bytes);
    }
  }
  Pool back = k, cpu_back = k;
  const Buffer others_before = others;
  vxl::cuda::transfer_rows_shim<true>({k.at(), order.data(), first, rows, dense.data()}, coin());
  vxl::gather_rows_cpu({k.at(), order.data(), first, rows, cpu.data()}, cpu_threads(threads));
  vxl::cuda::transfer_rows_shim<false>({back.at(), order.data(), first, rows, others.data()},
                                       coin());
  vxl::scatter_rows_cpu({cpu_back.at(), order.data(), first, rows, others.data()},
                        cpu_threads(threads));
  expect(dense == want, "gather_rows");
  expect(cpu == want, "gather_rows on the CPU");
  expect(k.buffer == want_k.buffer && others == others_before, "a source changed");
  expect(back.buffer == want_back.buffer, "scatter_rows");
  expect(cpu_back.buffer == want_back.buffer, "scatter_rows on the CPU");
}

// ---- traffic ---------------------------------------------------------------------------------

void print_traffic(const std::string& what, int64_t elements, int64_t minimum, bool exact) {
  const double moved = double(traffic.read + traffic.written), n = double(elements);
  const double sectors = 32.0 * double(traffic.sectors);
  std::printf("%-44s %9.2f %9.2f %8.3f %10.3f %10.2f %6ld\n", what.c_str(), moved / n,
              double(minimum) / n, moved / double(minimum), moved / sectors,
              32.0 * double(traffic.meta_sectors) / n, long(traffic.widest));
  expect(!exact || (traffic.read + traffic.written == minimum && traffic.widest == 16),
         "more bytes than the minimum");
}

template <typename T>
void rope_traffic(const char* name, int64_t batch, ChunkGeometry g, int64_t heads,
                  int64_t kv_heads, int64_t dim, bool wide = true) {
  auto c = rope_call<T>(batch, heads, kv_heads, dim, 64, g, std::vector<int32_t>(batch, 100));
  traffic = {};
  vxl::cuda::rope_shim(c.params(true), false);
  const int64_t rows = batch * g.rows();
  const int64_t appended_rows = batch * (g.ratio == 0 ? g.rows() : g.chunks * g.vsts());
  // q and k are read and written once. For each appended row K is written, V read and written.
  const int64_t rotated = rows * (heads + kv_heads) * dim;
  const int64_t appended = appended_rows * kv_heads * dim;
  print_traffic(name, rotated + 2 * appended, (2 * rotated + 3 * appended) * int64_t{sizeof(T)},
                wide);
}

void traffic_table() {
  vxl::cuda::count_sectors = true;
  std::printf("%-44s %9s %9s %8s %10s %10s %6s\n", "bytes per element", "moved", "least",
              "ratio", "of sectors", "metadata", "access");
  const ChunkGeometry split{1440, 8, 1, true}, published{1440, 16, 1, false};
  rope_traffic<Bf16>("rope_append bf16 28/4x128 w1440 r8 split", 1, split, 28, 4, 128);
  rope_traffic<F16>("rope_append fp16 28/4x128 w1440 r16 interl.", 1, published, 28, 4, 128);
  rope_traffic<float>("rope_append fp32 28/4x128 w1440 r8 split", 1, split, 28, 4, 128);
  rope_traffic<Bf16>("rope_append bf16 28/4x128 decode, batch 8", 8, {1, 0, 1, true}, 28, 4, 128);
  rope_traffic<Bf16>("rope_append bf16 14/2x64 w480 r4, 3 chunks", 1, {480, 4, 3, true}, 14, 2, 64);
  rope_traffic<Bf16>("rope_append bf16 8/2x80 w480 r8", 1, {480, 8, 1, true}, 8, 2, 80);
  rope_traffic<Bf16>("rope_append bf16 8/2x72 w480 r8 (elementwise)", 1, {480, 8, 1, true}, 8, 2,
                     72, false);

  const int64_t row = 4 * 128 * 2, layers = 4;
  Pool k(layers, 12, 64, row, 0, 0), v = k;
  std::vector<int32_t> copies{0, 6, 64, 1, 7, 30, 2, 8, 1, 0, 0, 0};
  traffic = {};
  vxl::cuda::copy_pages_shim({k.at(), v.at(), copies.data(), 4}, false);
  const int64_t copied = 2 * layers * 95 * row;
  print_traffic("copy_pages bf16 4x128 (64, 30, 1, 0 rows)", copied / 2, 2 * copied, true);
  Buffer dense(layers * 500 * row, 0);
  const std::vector<int32_t> table{5, 3, 9, 0, 1, 11, 7, 2, 4};
  traffic = {};
  vxl::cuda::transfer_rows_shim<true>({k.at(), table.data(), 37, 500, dense.data()}, false);
  print_traffic("gather_rows bf16 4x128, 500 rows from 37", dense.size / 2, 2 * dense.size, true);
  traffic = {};
  vxl::cuda::transfer_rows_shim<false>({k.at(), table.data(), 37, 500, dense.data()}, false);
  print_traffic("scatter_rows bf16 4x128, 500 rows from 37", dense.size / 2, 2 * dense.size, true);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--traffic") {
    traffic_table();
    return failures == 0 ? 0 : 1;
  }
  const int calls = argc > 1 ? std::atoi(argv[1]) : 60;
  check_angles();
  check_extremes();
  check_odd_ones<float>();
  check_odd_ones<Bf16>();
  check_odd_ones<F16>();
  for (int i = 0; i < calls; ++i) {
    random_rope<float>();
    random_rope<Bf16>();
    random_rope<F16>();
    const int64_t unit = int64_t{1} << pick(0, 4);
    random_pages(pick(1, 9), pick(1, 20), unit * pick(1, 40), unit);
  }
  random_pages(60, 64, 4096, 16, 2);  // several blocks a run, several threads on the CPU
  random_pages(140001, 1, 2, 2);      // more copies and pages than a grid's y and z allow
  expect(vector_calls > 0 && scalar_calls > 0, "only one of the two access widths ran");
  std::printf("CUDA kernels on the CPU: %d calls with 16-byte accesses, ", vector_calls);
  std::printf("%d elementwise, %d failures\n", scalar_calls, failures);
  return failures == 0 ? 0 : 1;
}
