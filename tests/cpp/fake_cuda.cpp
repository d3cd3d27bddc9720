// See fake_cuda.hpp.
#include "fake_cuda.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "core/platform/memory.hpp"

namespace vramkit::testing {
namespace {

constexpr CudaStatus kInvalidValue = 1;
constexpr CudaStatus kInvalidHandle = 400;
constexpr std::int64_t kPage = 4096;

bool touched(const std::byte* start, std::int64_t bytes) {
  std::vector<unsigned char> pages(static_cast<std::size_t>((bytes + kPage - 1) / kPage));
  if (::mincore(const_cast<std::byte*>(start), static_cast<std::size_t>(bytes), pages.data()) != 0)
    return false;
  return std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; });
}

}  // namespace

FakeCuda::FakeCuda(Options options) : options_(options) {
  for (int device = 0; device < options_.devices; ++device) {
    streams_.push_back(std::make_unique<Stream>());
    streams_.back()->id = static_cast<std::size_t>(device);
    streams_.back()->device = device;
  }
  for (auto& stream : streams_) {
    stream->thread = std::thread([this, &stream = *stream] { run(stream); });
  }
}

FakeCuda::~FakeCuda() {
  {
    const Lock lock(mutex_);
    stopping_ = true;
  }
  for (auto& stream : streams_) stream->work.notify_one();
  for (auto& stream : streams_) stream->thread.join();
  for (const auto& [start, reservation] : reservations_) {
    return_pages(reservation.start, reservation.bytes);
    return_pages(reservation.shadow, reservation.bytes);
  }
}

// Counts the call; what it is to fail with.
CudaStatus FakeCuda::enter(const char* name) {
  const Lock lock(mutex_);
  const std::int64_t call = calls_++;
  const CudaStatus status = fails_ ? fails_(call, name) : kCudaSuccess;
  ++counts_[name];
  if (status != kCudaSuccess) uncleared_.insert(std::this_thread::get_id());
  return status;
}

void FakeCuda::fail(Fails fails) {
  const Lock lock(mutex_);
  fails_ = std::move(fails);
}

int FakeCuda::current() const {
  const auto found = current_.find(std::this_thread::get_id());
  return found == current_.end() ? 0 : found->second;
}

FakeCuda::Stream* FakeCuda::stream_of(StreamHandle stream, const char* what) {
  Stream* found = stream == nullptr ? streams_[static_cast<std::size_t>(current())].get()
                                    : static_cast<Stream*>(stream);
  if (found->gone) complain(std::string(what) + ": on a stream that is gone");
  if (found->device != current()) complain(std::string(what) + ": on another device's stream");
  return found;
}

FakeCuda::Event* FakeCuda::event_of(CudaEventHandle event, const char* what) {
  auto* found = static_cast<Event*>(event);
  if (found == nullptr) {
    complain(std::string(what) + ": no event");
    return nullptr;
  }
  if (found->gone) complain(std::string(what) + ": an event that is gone");
  return found;
}

void FakeCuda::join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (std::size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

void FakeCuda::delay() {
  if (options_.delay_us == 0) return;
  int wait = 0;
  {
    const Lock lock(mutex_);
    wait = static_cast<int>(random_() % static_cast<unsigned>(options_.delay_us));
  }
  if (wait > 2) std::this_thread::sleep_for(std::chrono::microseconds(wait));
}

// Under the mutex. What the host knows to be done is done before what it enqueues.
void FakeCuda::push(Stream& stream, std::function<void()> work) {
  stream.queue.push_back(std::move(work));
  stream.work.notify_one();
}

template <typename Done>
void FakeCuda::wait_until(Lock& lock, Done done) {
  ++waiting_;
  changed_.wait(lock, done);
  --waiting_;
}

void FakeCuda::notify() {
  if (waiting_ > 0) changed_.notify_all();
}

void FakeCuda::run(Stream& stream) {
  Lock lock(mutex_);
  while (true) {
    stream.work.wait(lock, [&] { return stopping_ || stream.gone || !stream.queue.empty(); });
    if (stream.queue.empty()) return;
    const std::function<void()> work = std::move(stream.queue.front());
    stream.queue.pop_front();
    stream.busy = true;
    lock.unlock();
    work();
    lock.lock();
    stream.busy = false;
    notify();
  }
}

void FakeCuda::access(Stream& stream, const std::byte* at, std::int64_t bytes, bool write,
                      const char* what) {
  if (stream.clock.size() <= stream.id) stream.clock.resize(stream.id + 1);
  const std::byte* end = at + bytes;
  const std::int64_t tick = ++stream.clock[stream.id];
  std::erase_if(accesses_, [&](const Access& other) {
    if (other.begin >= end || other.end <= at || !(other.write || write)) return false;
    const bool ordered =
        other.stream < stream.clock.size() && other.tick <= stream.clock[other.stream];
    if (!ordered) {
      complain(std::string(what) + (write ? " writes" : " reads") + " bytes that another stream " +
               (other.write ? "writes" : "reads") + ", and no event orders the two");
    }
    return write && other.begin >= at && other.end <= end;
  });
  for (Access& other : accesses_) {
    if (other.begin == at && other.end == end && other.stream == stream.id &&
        other.write == write) {
      other.tick = tick;
      return;
    }
  }
  accesses_.push_back({at, end, stream.id, tick, write});
}

void FakeCuda::given_back(const std::byte* start, std::int64_t bytes, const char* what) {
  std::erase_if(accesses_, [&](const Access& other) {
    if (other.begin >= start + bytes || other.end <= start) return false;
    if (other.stream >= host_.size() || other.tick > host_[other.stream]) {
      complain(std::string(what) + ": the device may still use this memory");
    }
    return true;
  });
}

// Where the bytes of device memory really are; null, with a complaint, where there are none.
std::byte* FakeCuda::shadow(const std::byte* at, std::int64_t bytes, const char* what) {
  const auto after = reservations_.upper_bound(at);
  if (after != reservations_.begin()) {
    const Reservation& r = std::prev(after)->second;
    bool there = at + bytes <= r.start + r.bytes;
    for (const std::byte* byte = at; there && byte < at + bytes;) {
      const auto next = mappings_.upper_bound(byte);
      if (next == mappings_.begin()) {
        there = false;
        break;
      }
      const auto& [start, mapping] = *std::prev(next);
      there = byte < start + mapping.bytes && mapping.allowed;
      byte = start + mapping.bytes;
    }
    if (there) return r.shadow + (at - r.start);
  }
  complain(std::string(what) + ": device memory that is not there, or not to be accessed");
  return nullptr;
}

FakeCuda::Reservation FakeCuda::make_addresses(std::int64_t bytes, std::int64_t alignment) {
  auto* start = static_cast<std::byte*>(reserve_pages(bytes, std::max(alignment, kPage)));
  auto* behind = static_cast<std::byte*>(reserve_pages(bytes, kPage));
  if (start == nullptr || behind == nullptr || !commit_pages(behind, bytes)) {
    return {nullptr, nullptr, 0};
  }
  return reservations_[start] = {start, behind, bytes};
}

void FakeCuda::expect(const std::byte* at, std::string want, StreamHandle stream,
                      const std::string& what) {
  const Lock lock(mutex_);
  const auto bytes = static_cast<std::int64_t>(want.size());
  if (bytes == 0) return;
  Stream& on = *stream_of(stream, "a kernel");
  join(on.clock, host_);
  access(on, at, bytes, false, "a kernel");
  const std::byte* found = shadow(at, bytes, "a kernel");
  if (found == nullptr) return;
  push(on, [this, found, want = std::move(want), what] {
    delay();
    if (std::memcmp(found, want.data(), want.size()) == 0) return;
    const Lock inner(mutex_);
    complain(what + ": other bytes than expected");
  });
}

std::string FakeCuda::read(const std::byte* at, std::int64_t bytes, StreamHandle stream) {
  std::string out(static_cast<std::size_t>(bytes), '\0');
  Lock lock(mutex_);
  Stream& on = *stream_of(stream, "a read");
  join(on.clock, host_);
  access(on, at, bytes, false, "a read");
  const std::byte* found = shadow(at, bytes, "a read");
  if (found == nullptr) return out;
  bool done = false;
  push(on, [&, found] {
    std::memcpy(out.data(), found, out.size());
    const Lock inner(mutex_);
    done = true;
    notify();
  });
  wait_until(lock, [&] { return done; });
  join(host_, on.clock);
  return out;
}

void FakeCuda::finish() {
  Lock lock(mutex_);
  wait_until(lock, [&] {
    return std::all_of(streams_.begin(), streams_.end(),
                       [](const auto& s) { return s->queue.empty() && !s->busy; });
  });
  for (const auto& stream : streams_) join(host_, stream->clock);
}

std::vector<std::string> FakeCuda::complaints() {
  finish();
  const Lock lock(mutex_);
  std::vector<std::string> all = complaints_;
  if (!uncleared_.empty()) all.emplace_back("an error was left for others to find");
  if (open_ranges_ != 0) all.emplace_back("a range was begun and not ended");
  return all;
}

std::int64_t FakeCuda::count(const std::string& name) const {
  const Lock lock(mutex_);
  const auto found = counts_.find(name);
  return found == counts_.end() ? 0 : found->second;
}

std::int64_t FakeCuda::waits() const {
  return count("synchronize") + count("synchronize_device") + count("memory_info");
}

std::int64_t FakeCuda::waits_of(std::thread::id thread) const {
  const Lock lock(mutex_);
  const auto found = waits_.find(thread);
  return found == waits_.end() ? 0 : found->second;
}

std::int64_t FakeCuda::resources() const {
  std::int64_t sum = 0;
  for (const char* name :
       {"reserve_addresses", "free_addresses", "create", "release", "map", "unmap", "allow_access",
        "allocate", "deallocate", "register_host", "unregister_host", "is_pinned", "create_stream",
        "destroy_stream", "create_event", "destroy_event", "set_device"}) {
    sum += count(name);
  }
  return sum;
}

std::int64_t FakeCuda::used() const {
  const Lock lock(mutex_);
  return used_;
}

std::int64_t FakeCuda::reserved() const {
  const Lock lock(mutex_);
  std::int64_t sum = 0;
  for (const auto& [start, reservation] : reservations_) sum += reservation.bytes;
  return sum;
}

std::int64_t FakeCuda::pinned() const {
  const Lock lock(mutex_);
  std::int64_t sum = 0;
  for (const auto& [start, bytes] : registered_) sum += bytes;
  return sum;
}

std::int64_t FakeCuda::live() const {
  const Lock lock(mutex_);
  std::int64_t sum = static_cast<std::int64_t>(physical_.size());
  for (const auto& event : events_) sum += event->gone ? 0 : 1;
  for (const auto& stream : streams_) sum += stream->gone ? 0 : 1;
  return sum - options_.devices;
}

CudaStatus FakeCuda::device_count(int* count) {
  if (const CudaStatus s = enter("device_count")) return s;
  *count = options_.devices;
  return kCudaSuccess;
}

CudaStatus FakeCuda::set_device(int device) {
  if (const CudaStatus s = enter("set_device")) return s;
  if (device < 0 || device >= options_.devices) return kInvalidValue;
  const Lock lock(mutex_);
  current_[std::this_thread::get_id()] = device;
  contexts_.insert(device);
  return kCudaSuccess;
}

CudaStatus FakeCuda::get_device(int* device) {
  if (const CudaStatus s = enter("get_device")) return s;
  const Lock lock(mutex_);
  *device = current();
  return kCudaSuccess;
}

CudaStatus FakeCuda::has_context(int device, bool* has) {
  if (const CudaStatus s = enter("has_context")) return s;
  const Lock lock(mutex_);
  *has = contexts_.count(device) > 0;
  return kCudaSuccess;
}

CudaStatus FakeCuda::synchronize_device() {
  if (const CudaStatus s = enter("synchronize_device")) return s;
  {
    const Lock lock(mutex_);
    ++waits_[std::this_thread::get_id()];
  }
  finish();
  return kCudaSuccess;
}

CudaStatus FakeCuda::memory_info(std::int64_t* free, std::int64_t* total) {
  if (const CudaStatus s = enter("memory_info")) return s;
  const Lock lock(mutex_);
  contexts_.insert(current());
  *free = options_.memory - used_;
  *total = options_.memory;
  return kCudaSuccess;
}

std::string FakeCuda::describe(CudaStatus status) {
  return status == kCudaOutOfMemory ? "out of memory" : "injected";
}

void FakeCuda::clear_last_error() noexcept {
  const Lock lock(mutex_);
  uncleared_.erase(std::this_thread::get_id());
}

CudaStatus FakeCuda::allocation_granularity(int, std::int64_t* granularity) {
  if (const CudaStatus s = enter("allocation_granularity")) return s;
  *granularity = options_.granularity;
  return kCudaSuccess;
}

CudaStatus FakeCuda::reserve_addresses(std::byte** start, std::int64_t bytes,
                                       std::int64_t alignment) {
  if (const CudaStatus s = enter("reserve_addresses")) return s;
  const Lock lock(mutex_);
  *start = make_addresses(bytes, alignment).start;
  return *start == nullptr ? kCudaOutOfMemory : kCudaSuccess;
}

CudaStatus FakeCuda::free_addresses(std::byte* start, std::int64_t bytes) {
  if (const CudaStatus s = enter("free_addresses")) return s;
  const Lock lock(mutex_);
  const auto found = reservations_.find(start);
  if (found == reservations_.end() || found->second.bytes != bytes) {
    complain("free_addresses: not what was reserved");
    return kInvalidValue;
  }
  const auto mapped = mappings_.lower_bound(start);
  if (mapped != mappings_.end() && mapped->first < start + bytes) {
    complain("free_addresses: memory is mapped there");
    return kInvalidValue;
  }
  return_pages(found->second.start, bytes);
  return_pages(found->second.shadow, bytes);
  reservations_.erase(found);
  return kCudaSuccess;
}

CudaStatus FakeCuda::create(CudaAllocation* allocation, std::int64_t bytes, int device) {
  if (const CudaStatus s = enter("create")) return s;
  const Lock lock(mutex_);
  if (bytes % options_.granularity != 0 || device != current()) {
    complain("create: not in granules of the device");
  }
  if (used_ + bytes > options_.memory) {
    uncleared_.insert(std::this_thread::get_id());
    return kCudaOutOfMemory;
  }
  used_ += bytes;
  *allocation = next_allocation_++;
  physical_[*allocation] = {bytes};
  return kCudaSuccess;
}

void FakeCuda::drop_if_unused(CudaAllocation allocation) {
  const auto found = physical_.find(allocation);
  if (found->second.held || found->second.mappings > 0) return;
  used_ -= found->second.bytes;
  physical_.erase(found);
}

CudaStatus FakeCuda::release(CudaAllocation allocation) {
  if (const CudaStatus s = enter("release")) return s;
  const Lock lock(mutex_);
  const auto found = physical_.find(allocation);
  if (found == physical_.end() || !found->second.held) {
    complain("release: no such allocation");
    return kInvalidValue;
  }
  found->second.held = false;
  drop_if_unused(allocation);
  return kCudaSuccess;
}

CudaStatus FakeCuda::map(std::byte* start, std::int64_t bytes, CudaAllocation allocation) {
  if (const CudaStatus s = enter("map")) return s;
  const Lock lock(mutex_);
  const auto after = reservations_.upper_bound(start);
  const auto next = mappings_.lower_bound(start);
  const auto memory = physical_.find(allocation);
  const bool inside =
      after != reservations_.begin() &&
      start + bytes <= std::prev(after)->second.start + std::prev(after)->second.bytes;
  const bool free = (next == mappings_.end() || next->first >= start + bytes) &&
                    (next == mappings_.begin() ||
                     std::prev(next)->first + std::prev(next)->second.bytes <= start);
  if (!inside || !free || memory == physical_.end() || memory->second.bytes != bytes) {
    complain("map: over a mapping, outside of what is reserved, or of another size");
    return kInvalidValue;
  }
  ++memory->second.mappings;
  mappings_[start] = {bytes, allocation, false};
  const Reservation& r = std::prev(after)->second;
  std::memset(r.shadow + (start - r.start), 0xEE, static_cast<std::size_t>(bytes));
  return kCudaSuccess;
}

CudaStatus FakeCuda::unmap(std::byte* start, std::int64_t bytes) {
  if (const CudaStatus s = enter("unmap")) return s;
  const Lock lock(mutex_);
  const auto found = mappings_.find(start);
  if (found == mappings_.end() || found->second.bytes != bytes) {
    complain("unmap: not what was mapped");
    return kInvalidValue;
  }
  given_back(start, bytes, "unmap");
  const CudaAllocation allocation = found->second.allocation;
  mappings_.erase(found);
  --physical_[allocation].mappings;
  drop_if_unused(allocation);
  return kCudaSuccess;
}

CudaStatus FakeCuda::allow_access(std::byte* start, std::int64_t bytes, int) {
  if (const CudaStatus s = enter("allow_access")) return s;
  const Lock lock(mutex_);
  std::int64_t covered = 0;
  for (auto at = mappings_.lower_bound(start); at != mappings_.end() && at->first < start + bytes;
       ++at) {
    at->second.allowed = true;
    covered += at->second.bytes;
  }
  if (covered != bytes) complain("allow_access: not all of it is mapped");
  return kCudaSuccess;
}

CudaStatus FakeCuda::allocate(std::byte** start, std::int64_t bytes) {
  if (const CudaStatus s = enter("allocate")) return s;
  const Lock lock(mutex_);
  if (used_ + bytes > options_.memory) {
    uncleared_.insert(std::this_thread::get_id());
    return kCudaOutOfMemory;
  }
  const Reservation made = make_addresses((bytes + kPage - 1) / kPage * kPage, kPage);
  used_ += bytes;
  physical_[next_allocation_] = {bytes, true, 1};
  mappings_[made.start] = {made.bytes, next_allocation_++, true};
  std::memset(made.shadow, 0xEE, static_cast<std::size_t>(bytes));
  *start = made.start;
  return kCudaSuccess;
}

CudaStatus FakeCuda::deallocate(std::byte* start) {
  if (const CudaStatus s = enter("deallocate")) return s;
  const Lock lock(mutex_);
  const auto found = mappings_.find(start);
  const auto reserved = reservations_.find(start);
  if (found == mappings_.end() || reserved == reservations_.end()) {
    complain("deallocate: not what was allocated");
    return kInvalidValue;
  }
  given_back(start, found->second.bytes, "deallocate");
  used_ -= physical_[found->second.allocation].bytes;
  physical_.erase(found->second.allocation);
  mappings_.erase(found);
  return_pages(reserved->second.start, reserved->second.bytes);
  return_pages(reserved->second.shadow, reserved->second.bytes);
  reservations_.erase(reserved);
  return kCudaSuccess;
}

CudaStatus FakeCuda::register_host(std::byte* start, std::int64_t bytes) {
  if (const CudaStatus s = enter("register_host")) return s;
  const Lock lock(mutex_);
  if (!touched(start, bytes)) complain("register_host: pages that nobody has touched");
  const auto next = registered_.lower_bound(start);
  if (next != registered_.end() && next->first < start + bytes) {
    complain("register_host: registered already");
  }
  registered_[start] = bytes;
  return kCudaSuccess;
}

CudaStatus FakeCuda::unregister_host(std::byte* start) {
  if (const CudaStatus s = enter("unregister_host")) return s;
  const Lock lock(mutex_);
  const auto found = registered_.find(start);
  if (found == registered_.end()) {
    complain("unregister_host: not registered");
    return kInvalidValue;
  }
  given_back(start, found->second, "unregister_host");
  registered_.erase(found);
  return kCudaSuccess;
}

CudaStatus FakeCuda::is_pinned(const std::byte* address, bool* pinned) {
  if (const CudaStatus s = enter("is_pinned")) return s;
  const Lock lock(mutex_);
  const auto after = registered_.upper_bound(address);
  *pinned =
      after != registered_.begin() && address < std::prev(after)->first + std::prev(after)->second;
  return kCudaSuccess;
}

CudaStatus FakeCuda::create_stream(StreamHandle* stream) {
  if (const CudaStatus s = enter("create_stream")) return s;
  const Lock lock(mutex_);
  streams_.push_back(std::make_unique<Stream>());
  Stream& made = *streams_.back();
  made.id = streams_.size() - 1;
  made.device = current();
  made.thread = std::thread([this, &made] { run(made); });
  *stream = &made;
  return kCudaSuccess;
}

CudaStatus FakeCuda::destroy_stream(StreamHandle stream) {
  if (const CudaStatus s = enter("destroy_stream")) return s;
  const Lock lock(mutex_);
  auto* gone = static_cast<Stream*>(stream);
  if (gone->gone) complain("destroy_stream: it is gone");
  gone->gone = true;  // its work ends nevertheless, and its thread then
  gone->work.notify_one();
  return kCudaSuccess;
}

CudaStatus FakeCuda::create_event(CudaEventHandle* event) {
  if (const CudaStatus s = enter("create_event")) return s;
  const Lock lock(mutex_);
  events_.push_back(std::make_unique<Event>());
  events_.back()->device = current();
  *event = events_.back().get();
  return kCudaSuccess;
}

CudaStatus FakeCuda::destroy_event(CudaEventHandle event) {
  if (const CudaStatus s = enter("destroy_event")) return s;
  const Lock lock(mutex_);
  Event* gone = event_of(event, "destroy_event");
  if (gone == nullptr) return kInvalidHandle;
  gone->gone = true;
  return kCudaSuccess;
}

CudaStatus FakeCuda::record(CudaEventHandle event, StreamHandle stream) {
  if (const CudaStatus s = enter("record")) return s;
  const Lock lock(mutex_);
  Event* on = event_of(event, "record");
  Stream& from = *stream_of(stream, "record");
  if (on == nullptr) return kInvalidHandle;
  if (on->device != from.device) complain("record: the event is another device's");
  join(from.clock, host_);
  on->clock = from.clock;
  on->ticket = std::make_shared<bool>(false);
  push(from, [this, ticket = on->ticket] {
    const Lock inner(mutex_);
    *ticket = true;
    notify();
  });
  return kCudaSuccess;
}

CudaStatus FakeCuda::wait(StreamHandle stream, CudaEventHandle event) {
  if (const CudaStatus s = enter("wait")) return s;
  const Lock lock(mutex_);
  Event* on = event_of(event, "wait");
  Stream& waits = *stream_of(stream, "wait");
  if (on == nullptr) return kInvalidHandle;
  if (on->ticket == nullptr) return kCudaSuccess;  // never recorded: as if it had come
  join(waits.clock, host_);
  join(waits.clock, on->clock);
  push(waits, [this, ticket = on->ticket] {
    Lock inner(mutex_);
    wait_until(inner, [&] { return *ticket; });
  });
  return kCudaSuccess;
}

CudaStatus FakeCuda::synchronize(CudaEventHandle event) {
  if (const CudaStatus s = enter("synchronize")) return s;
  Lock lock(mutex_);
  Event* on = event_of(event, "synchronize");
  if (on == nullptr) return kInvalidHandle;
  ++waits_[std::this_thread::get_id()];
  if (on->ticket == nullptr) return kCudaSuccess;
  const Ticket ticket = on->ticket;
  const Clock clock = on->clock;
  wait_until(lock, [&] { return *ticket; });
  join(host_, clock);
  return kCudaSuccess;
}

void FakeCuda::enqueue_copy(Stream& stream, const CopyRange& copy) {
  if (copy.bytes == 0) return;
  const auto after = registered_.upper_bound(copy.src);
  if (after == registered_.begin() ||
      copy.src + copy.bytes > std::prev(after)->first + std::prev(after)->second) {
    complain("copy: from memory that is not pinned");
  }
  access(stream, copy.src, copy.bytes, false, "copy");
  access(stream, copy.dst, copy.bytes, true, "copy");
  std::byte* dst = shadow(copy.dst, copy.bytes, "copy");
  if (dst == nullptr) return;
  push(stream, [this, dst, copy] {
    delay();
    // Half, a pause, and the rest: what reads too early sees a torn block.
    const auto half = static_cast<std::size_t>(copy.bytes / 2);
    std::memcpy(dst, copy.src, half);
    delay();
    std::memcpy(dst + half, copy.src + half, static_cast<std::size_t>(copy.bytes) - half);
  });
}

CudaStatus FakeCuda::copy(std::byte* dst, const std::byte* src, std::int64_t bytes,
                          StreamHandle stream) {
  if (const CudaStatus s = enter("copy")) return s;
  const Lock lock(mutex_);
  Stream& on = *stream_of(stream, "copy");
  join(on.clock, host_);
  enqueue_copy(on, {dst, src, bytes});
  return kCudaSuccess;
}

CudaStatus FakeCuda::copy_batch(std::span<const CopyRange> copies, StreamHandle stream) {
  if (const CudaStatus s = enter("copy_batch")) return s;
  const Lock lock(mutex_);
  if (stream == nullptr) complain("copy_batch: not on the default stream");
  Stream& on = *stream_of(stream, "copy_batch");
  join(on.clock, host_);
  for (const CopyRange& each : copies) enqueue_copy(on, each);
  return kCudaSuccess;
}

CudaStatus FakeCuda::fill(std::byte* dst, std::uint8_t value, std::int64_t bytes,
                          StreamHandle stream) {
  if (const CudaStatus s = enter("fill")) return s;
  const Lock lock(mutex_);
  Stream& on = *stream_of(stream, "fill");
  join(on.clock, host_);
  access(on, dst, bytes, true, "fill");
  std::byte* found = shadow(dst, bytes, "fill");
  if (found == nullptr) return kCudaSuccess;
  push(on, [found, value, bytes] { std::memset(found, value, static_cast<std::size_t>(bytes)); });
  return kCudaSuccess;
}

}  // namespace vramkit::testing
