// Memory of the host that torch takes for a device's, tensors over it, and a generator of random numbers.

#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>

namespace {

using at::Tensor;
using c10::Device;
using c10::IValue;

constexpr c10::DeviceIndex kDevices = 8;
// How many of them there are for torch.
c10::DeviceIndex num_devices = kDevices;
thread_local c10::DeviceIndex current_device = 0;

Device this_device() {
  return Device(c10::kCUDA, current_device);
}

// Bytes of a device that are in use, and at most were.
struct Use {
  std::atomic<int64_t> now{0}, most{0};

  void add(int64_t num_bytes) {
    const int64_t sum = now += num_bytes;
    int64_t seen = most;
    while (seen < sum && !most.compare_exchange_weak(seen, sum)) {
    }
  }
};

Use uses[kDevices];

struct Piece {
  void* data;
  int64_t num_bytes;
  c10::DeviceIndex device;

  static void free(void* piece) {
    auto* self = static_cast<Piece*>(piece);
    uses[self->device].add(-self->num_bytes);
    c10::free_cpu(self->data);
    delete self;
  }
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    if (num_bytes == 0) return {nullptr, this_device()};
    auto* piece = new Piece{c10::alloc_cpu(num_bytes), static_cast<int64_t>(num_bytes), current_device};
    std::memset(piece->data, 0xFF, num_bytes);
    uses[current_device].add(piece->num_bytes);
    return {piece->data, piece, &Piece::free, this_device()};
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
};

// Where pinned pieces begin, and how long they are.
std::map<const char*, size_t> pinned;
std::mutex pinned_lock;

void free_pinned(void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  pinned.erase(static_cast<const char*>(data));
  c10::free_cpu(data);
}

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto next = pinned.upper_bound(static_cast<const char*>(data));
  if (next == pinned.begin()) return false;
  const auto& [begin, num_bytes] = *--next;
  return static_cast<const char*>(data) < begin + num_bytes;
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    const auto size = std::max<size_t>(num_bytes, 1);
    void* data = c10::alloc_cpu(size);
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned[static_cast<const char*>(data)] = size;
    return {data, data, &free_pinned, Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &free_pinned;
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
};

Memory memory;
PinnedMemory pinned_memory;

// A storage whose bytes another one of another device uses too; they count as the device's.
struct Sharing {
  c10::Storage storage;
  Device device;

  static void free(void* sharing) {
    auto* self = static_cast<Sharing*>(sharing);
    if (self->device.is_cuda()) uses[self->device.index()].add(-static_cast<int64_t>(self->storage.nbytes()));
    delete self;
  }
};

// The same bytes as a storage of another device. It keeps the first one alive.
c10::Storage share(const c10::Storage& from, Device device, c10::Allocator* allocator) {
  if (device.is_cuda()) uses[device.index()].add(static_cast<int64_t>(from.nbytes()));
  c10::DataPtr data(from.mutable_data(), new Sharing{from, device}, &Sharing::free, device);
  return c10::Storage(
      c10::Storage::use_byte_size_t(), from.nbytes(), std::move(data), allocator, /*resizable=*/true);
}

Tensor over(const c10::Storage& storage, const Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

Tensor on_host(const Tensor& tensor) {
  auto made = over(share(tensor.storage(), c10::kCPU, c10::GetCPUAllocator()), tensor, c10::DispatchKey::CPU);
  made._set_conj(tensor.is_conj());
  made._set_neg(tensor.is_neg());
  return made;
}

Tensor on_device(const Tensor& tensor, Device device) {
  return over(share(tensor.storage(), device, &memory), tensor, c10::DispatchKey::CUDA);
}

// A generator of the device: the host's, under another name.
struct Dice final : c10::GeneratorImpl {
  at::Generator host = at::detail::createCPUGenerator();

  explicit Dice(Device device) : GeneratorImpl(device, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override {
    host.set_current_seed(seed);
  }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override {
    return 0;
  }
  uint64_t current_seed() const override {
    return host.current_seed();
  }
  uint64_t seed() override {
    return host.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  static c10::DeviceType device_type() {
    return c10::kCUDA;
  }

 private:
  Dice* clone_impl() const override {
    auto* copy = new Dice(device());
    copy->host = host.clone();
    return copy;
  }
};

}  // namespace
