// See runtime_calls.hpp.
#include "cuda/runtime_calls.hpp"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define VRAMKIT_HAS_NVTX 1
#endif

#include <algorithm>
#include <array>

namespace vramkit::cuda {
namespace {

static_assert(kCudaSuccess == cudaSuccess && kCudaOutOfMemory == cudaErrorMemoryAllocation &&
              kCudaOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY);

constexpr CudaStatus kMissing = cudaErrorNotSupported;

CUdeviceptr address(const std::byte* start) { return reinterpret_cast<CUdeviceptr>(start); }
cudaStream_t stream_of(StreamHandle stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(CudaEventHandle event) { return static_cast<cudaEvent_t>(event); }

CUmemAllocationProp on_device(int device) {
  CUmemAllocationProp prop = {};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop.location.id = device;
  return prop;
}

}  // namespace

// The driver's functions, of the versions that their types name.
struct RuntimeCalls::Driver {
  PFN_cuDeviceGet_v2000 device_get = nullptr;
  PFN_cuDeviceGetAttribute_v2000 attribute = nullptr;
  PFN_cuDevicePrimaryCtxGetState_v7000 context_state = nullptr;
  PFN_cuMemGetAllocationGranularity_v10020 granularity = nullptr;
  PFN_cuMemAddressReserve_v10020 reserve = nullptr;
  PFN_cuMemAddressFree_v10020 free = nullptr;
  PFN_cuMemCreate_v10020 create = nullptr;
  PFN_cuMemRelease_v10020 release = nullptr;
  PFN_cuMemMap_v10020 map = nullptr;
  PFN_cuMemUnmap_v10020 unmap = nullptr;
  PFN_cuMemSetAccess_v10020 access = nullptr;
  bool batches = false;

  template <typename Function>
  static void find(const char* name, unsigned version, Function& function) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result);
    if (status != cudaSuccess) static_cast<void>(cudaGetLastError());
    if (status == cudaSuccess && result == cudaDriverEntryPointSuccess) {
      function = reinterpret_cast<Function>(found);
    }
  }

  Driver() {
    find("cuDeviceGet", 2000, device_get);
    find("cuDeviceGetAttribute", 2000, attribute);
    find("cuDevicePrimaryCtxGetState", 7000, context_state);
    find("cuMemGetAllocationGranularity", 10020, granularity);
    find("cuMemAddressReserve", 10020, reserve);
    find("cuMemAddressFree", 10020, free);
    find("cuMemCreate", 10020, create);
    find("cuMemRelease", 10020, release);
    find("cuMemMap", 10020, map);
    find("cuMemUnmap", 10020, unmap);
    find("cuMemSetAccess", 10020, access);
#if CUDART_VERSION >= 13000
    void* batch = nullptr;
    find("cuMemcpyBatchAsync", 13000, batch);
    batches = batch != nullptr;
#endif
  }
};

RuntimeCalls::RuntimeCalls() = default;
RuntimeCalls::~RuntimeCalls() = default;

const RuntimeCalls::Driver& RuntimeCalls::driver() const {
  std::call_once(once_, [this] { driver_ = std::make_unique<Driver>(); });
  return *driver_;
}

CudaStatus RuntimeCalls::device_count(int* count) { return cudaGetDeviceCount(count); }
CudaStatus RuntimeCalls::set_device(int device) { return cudaSetDevice(device); }
CudaStatus RuntimeCalls::get_device(int* device) { return cudaGetDevice(device); }
CudaStatus RuntimeCalls::synchronize_device() { return cudaDeviceSynchronize(); }

CudaStatus RuntimeCalls::has_context(int device, bool* has) {
  const Driver& d = driver();
  if (d.device_get == nullptr || d.context_state == nullptr) return kMissing;
  CUdevice handle = 0;
  if (const CUresult status = d.device_get(&handle, device)) return status;
  unsigned flags = 0;
  int active = 0;
  const CUresult status = d.context_state(handle, &flags, &active);
  *has = active != 0;
  return status;
}

CudaStatus RuntimeCalls::memory_info(std::int64_t* free, std::int64_t* total) {
  std::size_t left = 0, all = 0;
  const cudaError_t status = cudaMemGetInfo(&left, &all);
  *free = static_cast<std::int64_t>(left);
  *total = static_cast<std::int64_t>(all);
  return status;
}

std::string RuntimeCalls::describe(CudaStatus status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

void RuntimeCalls::clear_last_error() noexcept { static_cast<void>(cudaGetLastError()); }

CudaStatus RuntimeCalls::allocation_granularity(int device, std::int64_t* granularity) {
  *granularity = 0;
  const Driver& d = driver();
  for (const bool there :
       {d.device_get != nullptr, d.attribute != nullptr, d.granularity != nullptr,
        d.reserve != nullptr, d.free != nullptr, d.create != nullptr, d.release != nullptr,
        d.map != nullptr, d.unmap != nullptr, d.access != nullptr}) {
    if (!there) return kCudaSuccess;
  }
  CUdevice handle = 0;
  if (const CUresult status = d.device_get(&handle, device)) return status;
  int supported = 0;
  if (const CUresult status = d.attribute(
          &supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, handle)) {
    return status;
  }
  if (supported == 0) return kCudaSuccess;
  const CUmemAllocationProp prop = on_device(device);
  std::size_t finest = 0;
  const CUresult status = d.granularity(&finest, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  *granularity = static_cast<std::int64_t>(finest);
  return status;
}

CudaStatus RuntimeCalls::reserve_addresses(std::byte** start, std::int64_t bytes,
                                           std::int64_t alignment) {
  CUdeviceptr found = 0;
  const CUresult status = driver().reserve(&found, static_cast<std::size_t>(bytes),
                                           static_cast<std::size_t>(alignment), 0, 0);
  *start = reinterpret_cast<std::byte*>(found);
  return status;
}

CudaStatus RuntimeCalls::free_addresses(std::byte* start, std::int64_t bytes) {
  return driver().free(address(start), static_cast<std::size_t>(bytes));
}

CudaStatus RuntimeCalls::create(CudaAllocation* allocation, std::int64_t bytes, int device) {
  const CUmemAllocationProp prop = on_device(device);
  CUmemGenericAllocationHandle handle = 0;
  const CUresult status = driver().create(&handle, static_cast<std::size_t>(bytes), &prop, 0);
  *allocation = handle;
  return status;
}

CudaStatus RuntimeCalls::release(CudaAllocation allocation) { return driver().release(allocation); }

CudaStatus RuntimeCalls::map(std::byte* start, std::int64_t bytes, CudaAllocation allocation) {
  return driver().map(address(start), static_cast<std::size_t>(bytes), 0, allocation, 0);
}

CudaStatus RuntimeCalls::unmap(std::byte* start, std::int64_t bytes) {
  return driver().unmap(address(start), static_cast<std::size_t>(bytes));
}

CudaStatus RuntimeCalls::allow_access(std::byte* start, std::int64_t bytes, int device) {
  CUmemAccessDesc access = {};
  access.location = on_device(device).location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  return driver().access(address(start), static_cast<std::size_t>(bytes), &access, 1);
}

CudaStatus RuntimeCalls::allocate(std::byte** start, std::int64_t bytes) {
  void* found = nullptr;
  const cudaError_t status = cudaMalloc(&found, static_cast<std::size_t>(bytes));
  *start = static_cast<std::byte*>(found);
  return status;
}

CudaStatus RuntimeCalls::deallocate(std::byte* start) { return cudaFree(start); }

CudaStatus RuntimeCalls::register_host(std::byte* start, std::int64_t bytes) {
  return cudaHostRegister(start, static_cast<std::size_t>(bytes), cudaHostRegisterPortable);
}

CudaStatus RuntimeCalls::unregister_host(std::byte* start) { return cudaHostUnregister(start); }

CudaStatus RuntimeCalls::is_pinned(const std::byte* where, bool* pinned) {
  cudaPointerAttributes attributes = {};
  const cudaError_t status = cudaPointerGetAttributes(&attributes, where);
  *pinned = status == cudaSuccess && attributes.type == cudaMemoryTypeHost;
  return status;
}

CudaStatus RuntimeCalls::create_stream(StreamHandle* stream) {
  cudaStream_t made = nullptr;
  const cudaError_t status = cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
  *stream = made;
  return status;
}

CudaStatus RuntimeCalls::destroy_stream(StreamHandle stream) {
  return cudaStreamDestroy(stream_of(stream));
}

CudaStatus RuntimeCalls::create_event(CudaEventHandle* event) {
  cudaEvent_t made = nullptr;
  // Who waits for one sleeps: the engine's threads wait for whole copies.
  const cudaError_t status =
      cudaEventCreateWithFlags(&made, cudaEventDisableTiming | cudaEventBlockingSync);
  *event = made;
  return status;
}

CudaStatus RuntimeCalls::destroy_event(CudaEventHandle event) {
  return cudaEventDestroy(event_of(event));
}

CudaStatus RuntimeCalls::record(CudaEventHandle event, StreamHandle stream) {
  return cudaEventRecord(event_of(event), stream_of(stream));
}

CudaStatus RuntimeCalls::wait(StreamHandle stream, CudaEventHandle event) {
  return cudaStreamWaitEvent(stream_of(stream), event_of(event), cudaEventWaitDefault);
}

CudaStatus RuntimeCalls::synchronize(CudaEventHandle event) {
  return cudaEventSynchronize(event_of(event));
}

CudaStatus RuntimeCalls::copy(std::byte* dst, const std::byte* src, std::int64_t bytes,
                              StreamHandle stream) {
  return cudaMemcpyAsync(dst, src, static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice,
                         stream_of(stream));
}

bool RuntimeCalls::copies_in_batches() const { return driver().batches; }

CudaStatus RuntimeCalls::copy_batch(std::span<const CopyRange> copies, StreamHandle stream) {
#if CUDART_VERSION >= 13000
  constexpr std::size_t kMost = 64;
  std::array<void*, kMost> dsts;
  std::array<const void*, kMost> srcs;
  std::array<std::size_t, kMost> sizes;
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  std::size_t first = 0;  // the attributes are those of all
  for (std::size_t done = 0; done < copies.size();) {
    const std::size_t count = std::min(kMost, copies.size() - done);
    for (std::size_t at = 0; at < count; ++at) {
      dsts[at] = copies[done + at].dst;
      srcs[at] = copies[done + at].src;
      sizes[at] = static_cast<std::size_t>(copies[done + at].bytes);
    }
    const cudaError_t status = cudaMemcpyBatchAsync(dsts.data(), srcs.data(), sizes.data(), count,
                                                    &attributes, &first, 1, stream_of(stream));
    if (status != cudaSuccess) return status;
    done += count;
  }
  return kCudaSuccess;
#else
  static_cast<void>(copies), static_cast<void>(stream);
  return kMissing;
#endif
}

CudaStatus RuntimeCalls::fill(std::byte* dst, std::uint8_t value, std::int64_t bytes,
                              StreamHandle stream) {
  return cudaMemsetAsync(dst, value, static_cast<std::size_t>(bytes), stream_of(stream));
}

void RuntimeCalls::begin_range(const char* name) noexcept {
#ifdef VRAMKIT_HAS_NVTX
  nvtxRangePushA(name);
#else
  static_cast<void>(name);
#endif
}

void RuntimeCalls::end_range() noexcept {
#ifdef VRAMKIT_HAS_NVTX
  nvtxRangePop();
#endif
}

}  // namespace vramkit::cuda
