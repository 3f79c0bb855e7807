// A CUDA device for machines without one: memory of the host that torch takes for the device's.
//
// Every operation runs the CPU's kernel over the same memory, after it has been looked at as a GPU would:
// tensors of the host beside tensors of the device are refused. Fresh memory holds 0xFF, which is NaN in every
// floating dtype, so that what is read before it was written shows. Results of collectives and copies to pinned
// memory are there when they have been waited for, not before.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/extension.h>

#include <cstring>
#include <map>
#include <mutex>
#include <set>

namespace {

using at::Tensor;
using c10::Device;
using c10::IValue;

constexpr c10::DeviceIndex kDevices = 8;
thread_local c10::DeviceIndex current_device = 0;

Device this_device() {
  return Device(c10::kCUDA, current_device);
}

// ---- memory ----------------------------------------------------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    void* data = num_bytes ? c10::alloc_cpu(num_bytes) : nullptr;
    if (data) std::memset(data, 0xFF, num_bytes);
    return {data, data, &c10::free_cpu, this_device()};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &c10::free_cpu;
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

// The same bytes as a storage of another device. It keeps the first one alive.
c10::Storage share(const c10::Storage& from, Device device, c10::Allocator* allocator) {
  auto* keep = new c10::Storage(from);
  c10::DataPtr data(
      from.mutable_data(), keep, [](void* kept) { delete static_cast<c10::Storage*>(kept); }, device);
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

// ---- random numbers --------------------------------------------------------------------------------------------

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

// ---- operations ------------------------------------------------------------------------------------------------

struct Shared {
  Tensor device, host;
};

// Operations that take an index or a condition from the host, as on a GPU.
bool takes_host_tensors(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put_", "aten::_index_put_impl_",
      "aten::index_put"};
  return names.count(name) > 0;
}

// Told the name of every operation for which the host would wait for a GPU.
// Never freed: Python may be gone before.
py::object& on_wait = *new py::object(py::none());

void waits(const std::string& name) {
  if (on_wait.is_none()) return;
  py::gil_scoped_acquire gil;
  on_wait(name);
}

// Operations whose result's size only the device knows, or that look at values.
bool makes_host_wait(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
      "aten::bincount", "aten::equal", "aten::repeat_interleave.Tensor"};
  return names.count(name) > 0;
}

Tensor lower(const Tensor& tensor, std::vector<Shared>& all, Device& device, bool& any, bool& host_seen) {
  if (!tensor.defined()) return tensor;
  if (!tensor.is_cuda()) {
    // one number of the host may stand beside tensors of the device
    if (tensor.dim() > 0) host_seen = true;
    return tensor;
  }
  TORCH_CHECK(
      !any || device == tensor.device(), "Expected all tensors to be on the same device, but found at least two: ",
      device, " and ", tensor.device());
  any = true;
  device = tensor.device();
  for (const auto& one : all)
    if (one.device.is_same(tensor)) return one.host;
  all.push_back({tensor, on_host(tensor)});
  return all.back().host;
}

Tensor raise(const Tensor& tensor, const std::vector<Shared>& all, Device device) {
  if (!tensor.defined() || tensor.is_cuda()) return tensor;
  for (const auto& one : all)
    if (one.host.is_same(tensor)) return one.device;
  return on_device(tensor, device);
}

void run_on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = c10::toString(op.operator_name());
  auto arguments = torch::jit::last(*stack, schema.arguments().size());
  const auto begin = stack->size() - arguments.size();
  std::vector<Shared> all;
  Device device = this_device();
  bool any = false, host_seen = false;
  for (size_t i = begin; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = lower(value.toTensor(), all, device, any, host_seen);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(lower(tensor, all, device, any, host_seen));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList().vec())
        list.push_back(
            tensor.has_value() ? std::optional<Tensor>(lower(*tensor, all, device, any, host_seen)) : std::nullopt);
      value = list;
    } else if (value.isGenerator() && value.toGenerator().device().is_cuda()) {
      value = static_cast<Dice*>(value.toGenerator().unsafeGetGeneratorImpl())->host;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      device = value.toDevice().has_index() ? value.toDevice() : this_device();
      value = Device(c10::kCPU);
    }
  }
  TORCH_CHECK(
      !(any && host_seen) || takes_host_tensors(name),
      "Expected all tensors to be on the same device, but found at least two devices, ", device, " and cpu! (", name,
      ")");
  if (any && makes_host_wait(name)) waits(name);
  {
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset | c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView));
    op.callBoxed(stack);
  }
  // what the operation has resized
  for (const auto& one : all) {
    auto* impl = one.device.unsafeGetTensorImpl();
    if (one.host.sizes() == one.device.sizes() && one.host.strides() == one.device.strides()) continue;
    if (one.host.storage().data() != one.device.storage().data()) {
      auto moved = share(one.host.storage(), one.device.device(), &memory);
      auto storage = one.device.storage();
      storage.set_nbytes(moved.nbytes());
      storage.set_data_ptr(std::move(moved.unsafeGetStorageImpl()->mutable_data_ptr()));
    }
    impl->set_storage_offset(one.host.storage_offset());
    impl->set_sizes_and_strides(one.host.sizes(), one.host.strides());
  }
  const auto first = stack->size() - schema.returns().size();
  for (size_t i = first; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = raise(value.toTensor(), all, device);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(raise(tensor, all, device));
      value = list;
    }
  }
}

Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
    std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(device.has_value() && device->has_index() ? *device : this_device());
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), at::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(device.has_value() && device->has_index() ? *device : this_device());
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), at::dtype_or_default(dtype));
}

Tensor host_view(const Tensor& tensor) {
  return tensor.is_cuda() ? on_host(tensor) : tensor;
}

// Copies to pinned memory that nobody has waited for yet, and what they bring.
std::vector<std::pair<Tensor, Tensor>> late_copies;
std::mutex late_lock;

void synchronize() {
  std::vector<std::pair<Tensor, Tensor>> copies;
  {
    std::lock_guard<std::mutex> guard(late_lock);
    copies.swap(late_copies);
  }
  at::NoGradGuard no_grad;
  for (auto& [to, value] : copies) to.copy_(value);
}

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset | c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView));
  Tensor to = host_view(self);
  if (non_blocking && from.is_cuda() && !self.is_cuda() && is_pinned(self.data_ptr()) && self.is_contiguous()) {
    std::lock_guard<std::mutex> guard(late_lock);
    late_copies.emplace_back(self.detach(), host_view(from).to(self.scalar_type(), false, /*copy=*/true));
    std::memset(self.data_ptr(), 0xFF, self.nbytes());
    return self;
  }
  // from pageable memory the host waits too, until the copy has left it
  if (self.is_cuda() != from.is_cuda() && !(non_blocking && self.is_cuda())) waits("copy between host and device");
  to.copy_(host_view(from));
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (stride.data() || size.empty()) impl->set_sizes_and_strides(size, stride);
  else impl->set_sizes_contiguous(size);
  return self;
}

Tensor& set_source(Tensor& self, c10::Storage storage) {
  const auto size = static_cast<int64_t>(storage.nbytes() / self.element_size());
  return set_storage(self, std::move(storage), 0, {size}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& from) {
  return set_storage(self, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}

// What torch's own storage does on a GPU; without CUDA it was not built.
void resize_storage(const c10::Storage& storage, size_t num_bytes) {
  c10::DeviceGuard guard(storage.device());
  auto data = memory.allocate(num_bytes);
  const auto kept = std::min(num_bytes, storage.nbytes());
  if (kept) std::memcpy(data.get(), storage.data(), kept);
  storage.set_data_ptr(std::move(data));
  storage.set_nbytes(num_bytes);
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const auto needed = static_cast<size_t>((impl->numel() + impl->storage_offset()) * self.element_size());
  auto storage = self.storage();
  if (impl->numel() && needed > storage.nbytes()) {
    resize_storage(storage, needed);
  }
  return self;
}

at::Scalar local_scalar_dense(const Tensor& self) {
  synchronize();
  waits("aten::_local_scalar_dense");
  return at::_local_scalar_dense(on_host(self));
}

// The kernels of FlashAttention, which torch has for a GPU only, by their counterparts of the CPU.
void check_flash(const Tensor& x) {
  TORCH_CHECK(
      x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16,
      "FlashAttention only support fp16 and bf16 data type");
  TORCH_CHECK(x.stride(-1) == 1, "Input tensor must have contiguous last dimension");
  TORCH_CHECK(x.size(-1) % 8 == 0 && x.size(-1) <= 256, "head_size must be a multiple of 8, at most 256");
}

using Flash = std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>;

Flash flash(
    const Tensor& q, const Tensor& k, const Tensor& v, double dropout, bool causal, bool, std::optional<double> scale) {
  for (const auto* x : {&q, &k, &v}) check_flash(*x);
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
      on_host(q), on_host(k), on_host(v), dropout, causal, std::nullopt, scale);
  const auto none = at::empty({0}, q.options().dtype(at::kLong));
  return {on_device(out, q.device()), on_device(lse, q.device()), Tensor(), Tensor(), q.size(2), k.size(2), none, none,
          none};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double dropout, bool causal, const Tensor&, const Tensor&,
    std::optional<double> scale) {
  for (const auto* x : {&dout, &q, &k, &v, &out}) check_flash(*x);
  TORCH_CHECK(lse.is_cuda() && lse.scalar_type() == at::kFloat, "logsumexp must be fp32 on the device");
  auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      on_host(dout), on_host(q), on_host(k), on_host(v), on_host(out), on_host(lse), dropout, causal, std::nullopt,
      scale);
  return {on_device(dq, q.device()), on_device(dk, q.device()), on_device(dv, q.device())};
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("alias", &at::native::alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_source);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("resize_", &resize_);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("_scaled_dot_product_flash_attention", &flash);
  m.impl("_scaled_dot_product_flash_attention_backward", &flash_backward);
}

// ---- device ----------------------------------------------------------------------------------------------------

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
    TORCH_CHECK(device.is_cuda() && device.index() < kDevices, "invalid device ordinal: ", device);
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
    return kDevices;
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
    return kDevices;
  }
  int getNumGPUs() const override {
    return kDevices;
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

// ---- collectives -----------------------------------------------------------------------------------------------

// One collective under way. As on a GPU its results are there after `wait` and not before: until then they hold
// 0xFF; and what it reads must stay as it was.
class UnderWay final : public c10d::Work {
 public:
  // Gives the collective memory of its own in the place of `tensor`, whose value it takes along if that is read.
  Tensor writes(const Tensor& tensor, bool reads = false) {
    Tensor own = reads ? tensor.clone() : at::empty_like(tensor);
    results_.emplace_back(tensor, own);
    return own;
  }
  Tensor reads(const Tensor& tensor) {
    inputs_.emplace_back(tensor, tensor.clone());
    return inputs_.back().second;
  }
  void add(c10::intrusive_ptr<c10d::Work> work) {
    works_.push_back(std::move(work));
  }
  // Call it once, after everything was launched.
  void launched() {
    for (auto& [tensor, own] : results_)
      if (!is_read(tensor)) std::memset(tensor.data_ptr(), 0xFF, tensor.nbytes());
  }
  bool wait(std::chrono::milliseconds timeout) override {
    if (isCompleted()) return true;
    for (auto& work : works_) work->wait(timeout);
    for (auto& [tensor, before] : inputs_)
      TORCH_CHECK(
          std::memcmp(tensor.data_ptr(), before.data_ptr(), tensor.nbytes()) == 0,
          "a tensor was changed while a collective that reads it was under way");
    if (then) then();
    for (auto& [tensor, own] : results_) tensor.copy_(own);
    works_.clear();
    finish();
    return true;
  }

  // Done to the collective's own memory before the results appear.
  std::function<void()> then;

 private:
  // A result in the memory of an input, as in a reduction in place.
  bool is_read(const Tensor& result) const {
    for (const auto& [tensor, before] : inputs_)
      if (result.storage().data() == tensor.storage().data()) return true;
    return false;
  }

  std::vector<std::pair<Tensor, Tensor>> results_, inputs_;
  std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

// The collectives of NCCL by gloo. Refused as there: tensors of the host, or with gaps.
class Collectives final : public c10d::Backend {
 public:
  Collectives(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size)
      : Backend(rank, size), gloo_(std::move(gloo)) {}
  using Work = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<Tensor>;

  const std::string getBackendName() const override {
    return "nccl";
  }
  bool supportsCoalescing() const override {
    return true;
  }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override {
    return 0;
  }
  void startCoalescing() override {
    together_ = c10::make_intrusive<UnderWay>();
  }
  Work endCoalescing() override {
    auto work = std::move(together_);
    together_.reset();
    work->launched();
    return work;
  }
  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    return run([&](UnderWay& work) {
      Tensors own{work.writes(lowered(tensors[0]), /*reads=*/true)};
      work.add(gloo_->broadcast(own, options));
    });
  }
  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    return run([&](UnderWay& work) { reduce_all(work, work.writes(lowered(tensors[0]), true), options.reduceOp); });
  }
  Work allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    return run([&](UnderWay& work) {
      for (auto& tensor : tensors) reduce_all(work, work.writes(lowered(tensor), true), options.reduceOp);
    });
  }
  Work reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    return run([&](UnderWay& work) {
      Tensors own{work.writes(lowered(tensors[0]), true)};
      work.add(gloo_->reduce(own, options));
    });
  }
  Work allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions&) override {
    // by broadcasts: lengths may differ
    return run([&](UnderWay& work) {
      const auto in = work.reads(lowered(inputs[0]));
      for (int rank = 0; rank < getSize(); ++rank) {
        auto own = work.writes(lowered(outputs[0][rank]));
        if (rank == getRank()) own.copy_(in);
        c10d::BroadcastOptions options;
        options.rootRank = rank;
        Tensors one{own};
        work.add(gloo_->broadcast(one, options));
      }
    });
  }
  Work _allgather_base(Tensor& output, Tensor& input, const c10d::AllgatherOptions& options) override {
    return run([&](UnderWay& work) {
      auto in = work.reads(lowered(input)), out = work.writes(lowered(output));
      work.add(gloo_->_allgather_base(out, in, options));
    });
  }
  Work allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    return run([&](UnderWay& work) {
      for (size_t i = 0; i < inputs.size(); ++i) {
        auto in = work.reads(lowered(inputs[i])), out = work.writes(lowered(outputs[i]));
        work.add(gloo_->_allgather_base(out, in, options));
      }
    });
  }
  Work _reduce_scatter_base(Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& options) override {
    return run([&](UnderWay& work) { scatter_sum(work, output, input, options.reduceOp); });
  }
  Work reduce_scatter_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override {
    return run([&](UnderWay& work) {
      for (size_t i = 0; i < inputs.size(); ++i) scatter_sum(work, outputs[i], inputs[i], options.reduceOp);
    });
  }
  Work alltoall_base(
      Tensor& output, Tensor& input, std::vector<int64_t>& receive, std::vector<int64_t>& send,
      const c10d::AllToAllOptions& options) override {
    return run([&](UnderWay& work) {
      auto in = work.reads(lowered(input)), out = work.writes(lowered(output));
      work.add(gloo_->alltoall_base(out, in, receive, send, options));
    });
  }
  Work alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions&) override {
    return run([&](UnderWay& work) {
      for (int rank = 0; rank < getSize(); ++rank) {
        Tensors from{work.writes(lowered(outputs[rank]))}, to{work.reads(lowered(inputs[rank]))};
        if (rank == getRank()) {
          from[0].copy_(to[0]);
          continue;
        }
        work.add(gloo_->recv(from, rank, 0));
        work.add(gloo_->send(to, rank, 0));
      }
    });
  }
  Work send(Tensors& tensors, int to, int) override {
    return run([&](UnderWay& work) {
      Tensors own{work.reads(lowered(tensors[0]))};
      work.add(gloo_->send(own, to, 0));
    });
  }
  Work recv(Tensors& tensors, int from, int) override {
    return run([&](UnderWay& work) {
      Tensors own{work.writes(lowered(tensors[0]))};
      work.add(gloo_->recv(own, from, 0));
    });
  }
  Work gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    return run([&](UnderWay& work) {
      Tensors in{work.reads(lowered(inputs[0]))};
      std::vector<Tensors> out(outputs.size());
      for (size_t i = 0; i < outputs.size(); ++i)
        for (const auto& tensor : outputs[i]) out[i].push_back(work.writes(lowered(tensor)));
      work.add(gloo_->gather(out, in, options));
    });
  }
  Work scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) override {
    return run([&](UnderWay& work) {
      Tensors out{work.writes(lowered(outputs[0]))};
      std::vector<Tensors> in(inputs.size());
      for (size_t i = 0; i < inputs.size(); ++i)
        for (const auto& tensor : inputs[i]) in[i].push_back(work.reads(lowered(tensor)));
      work.add(gloo_->scatter(out, in, options));
    });
  }
  Work barrier(const c10d::BarrierOptions& options) override {
    return gloo_->barrier(options);
  }

 private:
  template <typename Launch>
  Work run(Launch launch) {
    // between start and end of coalescing all are one
    auto work = together_ ? together_ : c10::make_intrusive<UnderWay>();
    launch(*work);
    if (!together_) work->launched();
    return work;
  }
  void reduce_all(UnderWay& work, Tensor own, c10d::ReduceOp operation) {
    const bool mean = operation == c10d::ReduceOp::AVG;
    c10d::AllreduceOptions options;
    options.reduceOp = mean ? c10d::ReduceOp(c10d::ReduceOp::SUM) : operation;
    Tensors one{own};
    work.add(gloo_->allreduce(one, options));
    if (!mean) return;
    auto before = std::move(work.then);
    work.then = [before, own, size = getSize()]() mutable {
      if (before) before();
      own.div_(size);
    };
  }
  // By a sum of everything: right, not fast.
  void scatter_sum(UnderWay& work, Tensor& output, Tensor& input, c10d::ReduceOp operation) {
    auto all = work.reads(lowered(input));
    auto own = work.writes(lowered(output));
    auto sum = all.clone();
    reduce_all(work, sum, operation);
    auto before = std::move(work.then);
    work.then = [before, own, sum, size = getSize(), rank = getRank()]() mutable {
      if (before) before();
      own.view(-1).copy_(sum.view({size, -1})[rank]);
    };
  }
  static Tensor lowered(const Tensor& tensor) {
    TORCH_CHECK(tensor.is_cuda(), "Tensors must be CUDA and dense: found one on ", tensor.device());
    TORCH_CHECK(tensor.is_contiguous(), "Tensors must be contiguous");
    return on_host(tensor);
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
  c10::intrusive_ptr<UnderWay> together_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("replace_hooks", &replace_hooks);
  m.def("resize_storage", [](const Tensor& holder, size_t num_bytes) { resize_storage(holder.storage(), num_bytes); });
  m.def("set_device", [](int device) { Guard().setDevice(Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device))); });
  m.def("synchronize", &synchronize);
  m.def("tell_waits", [](py::object callback) { on_wait = std::move(callback); });
  m.def("current_device", [] { return static_cast<int>(current_device); });
  m.def("device_count", [] { return static_cast<int>(kDevices); });
  m.def("collectives", [](c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) {
    return c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<Collectives>(std::move(gloo), rank, size));
  });
}
