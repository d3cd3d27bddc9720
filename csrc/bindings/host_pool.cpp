// Python's view of the pool: pieces are buffers, which go back when nothing refers to them.
#include "core/host_pool.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "bindings/bindings.hpp"
#include "core/error.hpp"
#include "core/platform/memory.hpp"

namespace py = pybind11;

namespace vramkit::bindings {
namespace {

// Keeps the pool alive, so that a tensor outlives the pool's other users.
class Piece {
 public:
  Piece(std::shared_ptr<HostPool> pool, void* start, std::int64_t bytes)
      : pool_(std::move(pool)), start_(start), bytes_(bytes) {}
  ~Piece() { pool_->give(start_); }
  Piece(const Piece&) = delete;
  Piece& operator=(const Piece&) = delete;

  py::buffer_info buffer() const {
    return {static_cast<std::uint8_t*>(start_), static_cast<py::ssize_t>(bytes_)};
  }

 private:
  std::shared_ptr<HostPool> pool_;
  void* start_;
  std::int64_t bytes_;
};

std::unique_ptr<Piece> take(const std::shared_ptr<HostPool>& pool, std::int64_t bytes) {
  void* start = nullptr;
  {
    py::gil_scoped_release release;
    start = pool->take(bytes);
  }
  if (start != nullptr) return std::make_unique<Piece>(pool, start, bytes);
  const HostPool::Stats stats = pool->stats();
  const std::string what = "the pool has no room for " + std::to_string(bytes) +
                           " bytes: " + std::to_string(stats.used) + " are lent, " +
                           std::to_string(stats.held) + " held";
  if (pool->limit()) {
    throw BudgetError(what + ", and its limit is " + std::to_string(*pool->limit()) +
                          "; raise the limit or let go of what it lent",
                      stats.used + bytes);
  }
  PyErr_SetString(PyExc_MemoryError, (what + ", and the system gives no more").c_str());
  throw py::error_already_set();
}

}  // namespace

void bind_host_pool(py::module_& m) {
  py::class_<Piece>(m, "HostPiece", py::buffer_protocol(), "Memory lent by a HostPool.")
      .def_buffer(&Piece::buffer);

  py::class_<HostPool::Stats>(m, "HostPoolStats", "What a pool holds and has lent, in bytes.")
      .def_readonly("held", &HostPool::Stats::held)
      .def_readonly("used", &HostPool::Stats::used)
      .def_readonly("peak_used", &HostPool::Stats::peak_used)
      .def_readonly("segments", &HostPool::Stats::segments)
      .def_readonly("lent", &HostPool::Stats::lent)
      .def_readonly("reused", &HostPool::Stats::reused)
      .def("__repr__", [](const HostPool::Stats& s) {
        return "HostPoolStats(held=" + std::to_string(s.held) + ", used=" + std::to_string(s.used) +
               ", peak_used=" + std::to_string(s.peak_used) +
               ", segments=" + std::to_string(s.segments) + ", lent=" + std::to_string(s.lent) +
               ", reused=" + std::to_string(s.reused) + ")";
      });

  py::class_<HostPool, std::shared_ptr<HostPool>>(m, "HostPool", "Touched memory, lent again.")
      .def(py::init<std::optional<std::int64_t>>(), py::arg("limit") = py::none())
      .def("take", &take, py::arg("bytes"))
      .def("trim", &HostPool::trim, py::call_guard<py::gil_scoped_release>())
      .def("stats", &HostPool::stats)
      .def_property_readonly("limit", &HostPool::limit);

  m.def(
      "advise_large_pages",
      [](std::uintptr_t start, std::int64_t bytes) {
        advise_large_pages(reinterpret_cast<void*>(start), bytes);
      },
      py::arg("start"), py::arg("bytes"),
      "Ask that fresh memory be backed by large pages where it covers them.");
}

}  // namespace vramkit::bindings
