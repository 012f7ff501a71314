// vxl::PageManager for Python. A call releases the GIL before it waits for the manager's lock, so a
// long call in one thread never stops Python in the others.
#include "../cache/page_manager.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

namespace py = pybind11;

namespace {

using vxl::PageManager;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;
using Ids = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

PYBIND11_CONSTINIT py::gil_safe_call_once_and_store<py::object> pool_exhausted_class;

void raise_pool_exhausted(const vxl::PoolExhausted& e) {
  const py::object& type = pool_exhausted_class.get_stored();
  py::object error = type(e.what());
  error.attr("pages_needed") = e.pages_needed;
  error.attr("pages_free") = e.pages_free;
  PyErr_SetObject(type.ptr(), error.ptr());
}

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const vxl::PoolExhausted& e) {
    raise_pool_exhausted(e);
  } catch (const vxl::UnknownSequence& e) {
    py::set_error(PyExc_KeyError, e.what());
  }  // pybind11 turns std::invalid_argument into ValueError and std::bad_alloc into MemoryError
}

// An integer argument, by __index__ only: 1.5 is refused and not rounded.
py::arg integer(const char* name) { return py::arg(name).noconvert(); }

// Ids from anything that NumPy turns into integers (n,). The type Ids alone would round 1.5.
Ids ids(const py::object& seqs, const std::string& name = "seqs") {
  const py::array given = py::array::ensure(seqs);
  if (!given) throw py::type_error(name + ": got no array of numbers, expected integers (n,)");
  const char kind = given.dtype().kind();
  if (given.size() > 0 && kind != 'i' && kind != 'u') {
    throw py::type_error(name + ": got " + std::string(py::str(given.dtype())) +
                         ", expected integers");
  }
  if (given.ndim() != 1) {
    throw std::invalid_argument(name + ": got " + std::to_string(given.ndim()) +
                                " dimensions, expected 1");
  }
  return Ids(given);
}

// Rows of each of n sequences: one number for all, or integers (n,).
std::vector<int64_t> rows_of_each(const py::object& rows, int64_t n) {
  if (PyIndex_Check(rows.ptr()) && !py::isinstance<py::array>(rows)) {
    const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(rows.ptr()));
    int overflow = 0;
    const int64_t all = number ? PyLong_AsLongLongAndOverflow(number.ptr(), &overflow) : -1;
    if (!number) throw py::error_already_set();
    if (overflow != 0) throw py::type_error("rows: got an integer outside int64");
    return std::vector<int64_t>(n, all);
  }
  const Ids each = ids(rows, "rows");
  if (each.size() != n) {
    throw std::invalid_argument("rows: got " + std::to_string(each.size()) +
                                " numbers, expected one for each of " + std::to_string(n) +
                                " sequences");
  }
  return std::vector<int64_t>(each.data(), each.data() + n);
}

py::array_t<int32_t> copies_array(const std::vector<vxl::PageCopy>& copies) {
  static_assert(sizeof(vxl::PageCopy) == 3 * sizeof(int32_t), "a row of the array");
  return py::array_t<int32_t>({static_cast<py::ssize_t>(copies.size()), py::ssize_t{3}},
                              reinterpret_cast<const int32_t*>(copies.data()));
}

// Checks for a writable, C-contiguous int32 array with a row for each sequence. It is written in
// place, so nothing may be converted.
int32_t* output(py::array& out, py::ssize_t ndim, int64_t rows) {
  const bool dtype_fits = py::isinstance<py::array_t<int32_t>>(out);
  const bool contiguous = (out.flags() & py::array::c_style) != 0;
  if (!dtype_fits || !contiguous || !out.writeable() || out.ndim() != ndim ||
      out.shape(0) != rows) {
    throw std::invalid_argument(
        "out: got " + std::string(py::str(out.dtype())) + " of shape " +
        std::string(py::str(out.attr("shape"))) + (contiguous ? "" : ", not contiguous") +
        (out.writeable() ? "" : ", read-only") + ", expected a writable C-contiguous int32 " +
        "array of shape (" + std::to_string(rows) + (ndim == 1 ? ",)" : ", stride)"));
  }
  return static_cast<int32_t*>(out.mutable_data());
}

py::array_t<int32_t> reserve(PageManager& self, int64_t seq, int64_t rows) {
  std::vector<vxl::PageCopy> copies;
  {
    const py::gil_scoped_release release;
    copies = self.reserve(seq, rows);
  }
  return copies_array(copies);
}

py::array_t<int32_t> reserve_many(PageManager& self, const py::object& seqs,
                                  const py::object& rows) {
  const Ids batch = ids(seqs);
  const std::vector<int64_t> each = rows_of_each(rows, batch.size());
  std::vector<vxl::PageCopy> copies;
  {
    const py::gil_scoped_release release;
    copies = self.reserve(batch.data(), batch.size(), each.data());
  }
  return copies_array(copies);
}

void commit_many(PageManager& self, const py::object& seqs, const py::object& rows) {
  const Ids batch = ids(seqs);
  const std::vector<int64_t> each = rows_of_each(rows, batch.size());
  const py::gil_scoped_release release;
  self.commit(batch.data(), batch.size(), each.data());
}

py::array_t<int32_t> block_table(const PageManager& self, int64_t seq) {
  std::vector<int32_t> table;
  {
    const py::gil_scoped_release release;
    table = self.block_table(seq);
  }
  return py::array_t<int32_t>(static_cast<py::ssize_t>(table.size()), table.data());
}

int64_t most_pages(const PageManager& self, const py::object& seqs) {
  const Ids batch = ids(seqs);
  const py::gil_scoped_release release;
  return self.most_pages(batch.data(), batch.size());
}

void fill_block_tables(const PageManager& self, const py::object& seqs, py::array out,
                       int32_t pad) {
  const Ids batch = ids(seqs);
  int32_t* const to = output(out, 2, batch.size());
  const int64_t stride = out.shape(1);
  const py::gil_scoped_release release;
  self.fill_block_tables(batch.data(), batch.size(), to, stride, pad);
}

void fill_lengths(const PageManager& self, const py::object& seqs, py::array out) {
  const Ids batch = ids(seqs);
  int32_t* const to = output(out, 1, batch.size());
  const py::gil_scoped_release release;
  self.fill_lengths(batch.data(), batch.size(), to);
}

py::dict stats(const PageManager& self) {
  vxl::PageStats s{};
  {
    const py::gil_scoped_release release;
    s = self.stats();
  }
  using py::literals::operator""_a;
  return py::dict("free_pages"_a = s.free_pages, "used_pages"_a = s.used_pages,
                  "shared_pages"_a = s.shared_pages, "peak_used_pages"_a = s.peak_used_pages,
                  "sequences"_a = s.sequences, "tokens"_a = s.tokens,
                  "page_copies"_a = s.page_copies);
}

std::string repr(const PageManager& self) {
  vxl::PageStats s{};
  {
    const py::gil_scoped_release release;
    s = self.stats();
  }
  return "PageManager(num_pages=" + std::to_string(self.num_pages()) +
         ", page_size=" + std::to_string(self.page_size()) + "): " +
         std::to_string(s.sequences) + " sequences, " + std::to_string(s.free_pages) +
         " pages free";
}

void bind_pool_exhausted(py::module_& m) {
  pool_exhausted_class.call_once_and_store_result([&] {
    py::object type = py::exception<vxl::PoolExhausted>(m, "PoolExhausted", PyExc_MemoryError);
    type.attr("__doc__") =
        "The pool has too few free pages for a reserve(). Nothing has changed.\n\n"
        "pages_needed, pages_free: int, the pages that the call needed and that were free.";
    return type;
  });
  py::register_local_exception_translator(translate);
}

constexpr const char* kClassDoc =
    R"(Pages of a cache: which sequence holds which page, and which page may be written.

PageManager(num_pages, page_size): page_size is the rows of a page, a power of two. The manager
holds no cache contents. A step is

    copies = manager.reserve(seq, rows)    # makes room; perform the copies before writing
    ...                                    # write rows [length, length + rows)
    manager.commit(seq, rows)              # now they count

Row r of a sequence lies in page block_table(seq)[r // page_size], at r % page_size.
fork() shares pages. A shared, partly filled last page is copied when one of its holders
next reserves.

A call that raises has changed nothing. ValueError: an argument is out of range; the message
names it. KeyError: no live sequence has this id. PoolExhausted, a MemoryError: too few free
pages. TypeError: not an integer, or outside int64.

Calls are safe from any thread and return copies. The manager cannot order writes to the
pages themselves: perform the copies of a reserve before any later write to the pool.)";

void bind_sequences(py::class_<PageManager>& c) {
  c.def("new_sequence", &PageManager::new_sequence, ReleaseGil(),
        "Id of a new, empty sequence. Ids are never reused.");
  c.def("fork", &PageManager::fork, integer("seq"), ReleaseGil(),
        "Id of a new sequence with the committed rows of seq. It shares the pages of seq and takes "
        "no new one.\nA reservation of seq stays with seq alone.");
  c.def("truncate", &PageManager::truncate, integer("seq"), integer("length"), ReleaseGil(),
        "Keeps the first `length` committed rows, 0 to length(seq), and drops any reservation.");
  c.def("free", &PageManager::free, integer("seq"), ReleaseGil(),
        "Ends a sequence. Pages that no other sequence holds become free.");
}

void bind_growing(py::class_<PageManager>& c) {
  c.def("reserve", &reserve, integer("seq"), integer("rows"),
        R"(Makes room for `rows` rows after the committed ones.

`rows` is absolute, not additive: reserve(seq, 8) after reserve(seq, 5) makes room for 8. A
reservation never shrinks and keeps what was written into it.

Returns int32 (copies, 3), each row [source page, target page, rows]: copy the first `rows`
rows of the source page to the target page before you write. There is one copy if the last page
of seq is partly filled and shared, else none.

Raises PoolExhausted, with pages_needed and pages_free.)");
  c.def("reserve_many", &reserve_many, py::arg("seqs"), py::arg("rows"),
        R"(reserve() for all of `seqs`, int (n,), distinct. Reserves for all or for none. `rows` is
one number for all of them, or int (n,).

Returns int32 (copies, 3), at most one copy for each sequence. No page is both a source and a
target, so the copies may run in any order or at once.)");
  c.def("commit", py::overload_cast<int64_t, int64_t>(&PageManager::commit), integer("seq"),
        integer("rows"), ReleaseGil(),
        "Turns the first `rows` reserved rows into committed ones. The others stay reserved.");
  c.def("commit_many", &commit_many, py::arg("seqs"), py::arg("rows"),
        "commit() for all of `seqs`, int (n,), distinct. Commits for all or for none. `rows` is "
        "one number for all of them, or int (n,).");
}

void bind_reading(py::class_<PageManager>& c) {
  c.def_property_readonly("num_pages", &PageManager::num_pages, "Pages of the pool.");
  c.def_property_readonly("page_size", &PageManager::page_size, "Rows of a page.");
  c.def("length", &PageManager::length, integer("seq"), ReleaseGil(), "Committed rows.");
  c.def("reserved", &PageManager::reserved, integer("seq"), ReleaseGil(),
        "Rows after the committed ones that may be written.");
  c.def("capacity", &PageManager::capacity, integer("seq"), ReleaseGil(),
        "Rows that the pages of the block table hold: page_size times its length.");
  c.def("block_table", &block_table, integer("seq"),
        "int32 (pages,): the pages of the committed and the reserved rows.");
  c.def("most_pages", &most_pages, py::arg("seqs"),
        "Pages of the longest block table among seqs, int (n,): the width for fill_block_tables.");
  c.def("fill_block_tables", &fill_block_tables, py::arg("seqs"), py::arg("out"),
        integer("pad") = 0,
        R"(Writes the block table of seqs[i] to out[i], and `pad` after its last page.

seqs int (n,), may repeat. out int32 (n, stride), C-contiguous, e.g. numpy() of a pinned tensor.
The default pad is an existing page, so a kernel that reads past the end stays in the pool.)");
  c.def("fill_lengths", &fill_lengths, py::arg("seqs"), py::arg("out"),
        "Writes the number of committed rows of seqs[i] to out[i]. seqs int (n,), out int32 (n,).");
  c.def("free_pages", &PageManager::free_pages, ReleaseGil(), "Pages that no sequence holds.");
  c.def("ref_count", &PageManager::ref_count, integer("page"), ReleaseGil(),
        "Number of sequences that hold a page; 0 if it is free.");
  c.def("stats", &stats,
        R"(dict of int: free_pages; used_pages (held by at least one sequence); shared_pages (by
two or more); peak_used_pages; sequences; tokens (committed rows of all sequences, where a shared
row counts for each of them); page_copies (returned by reserve so far).)");
  c.def("__repr__", &repr);
}

}  // namespace

void bind_page_manager(py::module_& m) {
  bind_pool_exhausted(m);
  py::class_<PageManager> c(m, "PageManager", kClassDoc);
  c.def(py::init<int64_t, int64_t>(), integer("num_pages"), integer("page_size"));
  bind_sequences(c);
  bind_growing(c);
  bind_reading(c);
}
