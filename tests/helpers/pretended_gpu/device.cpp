// A CUDA device for machines without one: memory of the host that torch takes for the device's.
//
// Every operation runs the CPU's kernel over the same memory, after it has been looked at as a GPU would:
// tensors of the host beside tensors of the device are refused. Fresh memory holds 0xFF, which is NaN in every
// floating dtype, so that what is read before it was written shows. Results of collectives and copies to pinned
// memory are there when they have been waited for, not before.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "collectives.h"
#include "device_memory.h"
#include "operations.h"

namespace {

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return c10::kCUDA;
  }
  Device exchangeDevice(Device device) const override {
    Device old = this_device();
    setDevice(device);
    return old;
  }
  Device getDevice() const override {
    return this_device();
  }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.is_cuda() && device.index() < num_devices, "invalid device ordinal: ", device);
    if (device.has_index()) current_device = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getNewStream(Device device, int) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return c10::Stream(c10::Stream::DEFAULT, stream.device());
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  c10::DeviceIndex deviceCount() const noexcept override {
    return num_devices;
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
REGISTER_ALLOCATOR(c10::kCUDA, &memory)

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return num_devices;
  }
  int getNumGPUs() const override {
    return num_devices;
  }
  c10::DeviceIndex current_device() const override {
    return ::current_device;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return ::current_device;
  }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    ::current_device = device;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(::current_device, device);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(::current_device, device);
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<Dice>(device < 0 ? this_device() : Device(c10::kCUDA, device));
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = at::make_generator<Dice>(Device(c10::kCUDA, 0));
    return generator;
  }
  bool isPinnedPtr(const void* data) const override {
    return is_pinned(data);
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_memory;
  }
  at::Allocator* getCUDADeviceAllocator() const override {
    return &memory;
  }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(Hooks)

// torch asks for the hooks once. Where it asked before this library came, the object that it keeps becomes ours:
// both have no data of their own.
void replace_hooks() {
  static Hooks ours{at::CUDAHooksArgs{}};
  const auto& kept = at::detail::getCUDAHooks();
  if (kept.hasCUDA()) return;
  std::memcpy(const_cast<void*>(static_cast<const void*>(&kept)), static_cast<const void*>(&ours), sizeof(void*));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("replace_hooks", &replace_hooks);
  m.def("resize_storage", [](const Tensor& holder, size_t num_bytes) { resize_storage(holder.storage(), num_bytes); });
  m.def("set_device", [](int device) { Guard().setDevice(Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device))); });
  m.def("synchronize", &synchronize);
  m.def("memory_allocated", [](int device) { return uses[device].now.load(); });
  m.def("max_memory_allocated", [](int device) { return uses[device].most.load(); });
  m.def("reset_peak", [](int device) { uses[device].most = uses[device].now.load(); });
  m.def("lock_memory", [](uintptr_t data, size_t num_bytes) {
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned[reinterpret_cast<const char*>(data)] = num_bytes;
  });
  m.def("unlock_memory", [](uintptr_t data) {
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.erase(reinterpret_cast<const char*>(data));
  });
  m.def("tell_waits", [](py::object callback) { on_wait = std::move(callback); });
  m.def("current_device", [] { return static_cast<int>(current_device); });
  m.def("device_count", [] { return static_cast<int>(num_devices); });
  m.def("set_device_count", [](int count) {
    TORCH_CHECK(0 < count && count <= kDevices, "1 to ", int{kDevices}, " devices, not ", count);
    num_devices = static_cast<c10::DeviceIndex>(count);
  });
  m.def("collectives", [](c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) {
    return c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<Collectives>(std::move(gloo), rank, size));
  });
}
