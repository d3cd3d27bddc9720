// The host's backend; see backend.hpp.
#include "core/engine/backend.hpp"

#include <cstring>
#include <utility>

namespace vramkit {
namespace {

// Copies happen at once, so there is nothing to order.
class HostLane : public Lane {
 public:
  void copy(std::span<const CopyRange> copies) override {
    for (const CopyRange& copy : copies) {
      std::memcpy(copy.dst, copy.src, static_cast<std::size_t>(copy.bytes));
    }
  }
  void wait(Event&) override {}
  void record(Event&) override {}
};

}  // namespace

HostBackend::HostBackend(std::shared_ptr<Memory> memory) : memory_(std::move(memory)) {}

std::unique_ptr<Lane> HostBackend::make_lane() { return std::make_unique<HostLane>(); }

void HostBackend::fill(std::byte* dst, std::uint8_t value, std::int64_t bytes) {
  std::memset(dst, value, static_cast<std::size_t>(bytes));
}

}  // namespace vramkit
