// Every operation by the CPU's kernel over the same memory, after a look at its tensors as a GPU would take it.

#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>

#include <set>

#include "device_memory.h"

namespace {

// Told the name of every operation for which the host would wait for a GPU. Never freed: Python may end before.
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

// Operations that take an index from the host, as on a GPU.
bool takes_host_tensors(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put_", "aten::_index_put_impl_",
      "aten::index_put"};
  return names.count(name) > 0;
}

// While it lives, operations go to the CPU's kernels and not to autograd, which has seen them already.
struct BelowAutograd {
  c10::impl::ExcludeDispatchKeyGuard guard{
      c10::autograd_dispatch_keyset | c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView)};
};

// One operation: its tensors replaced by such of the host, and its results by such of the device.
class HostCall {
 public:
  explicit HostCall(std::string name) : name_(std::move(name)) {}

  IValue lower(IValue value) {
    if (value.isTensor()) return lower(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(lower(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList().vec())
        list.push_back(tensor.has_value() ? std::optional<Tensor>(lower(*tensor)) : std::nullopt);
      return list;
    }
    if (value.isGenerator() && value.toGenerator().device().is_cuda())
      return static_cast<Dice*>(value.toGenerator().unsafeGetGeneratorImpl())->host;
    if (value.isDevice() && value.toDevice().is_cuda()) {
      device_ = value.toDevice().has_index() ? value.toDevice() : this_device();
      return Device(c10::kCPU);
    }
    return value;
  }

  IValue raise(IValue value) const {
    if (value.isTensor()) return raise(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(raise(tensor));
    return list;
  }

  // Call it when all arguments are lowered.
  void check() const {
    TORCH_CHECK(
        !(on_device_ && on_host_) || takes_host_tensors(name_),
        "Expected all tensors to be on the same device, but found at least two devices, ", device_, " and cpu! (",
        name_, ")");
    if (on_device_ && makes_host_wait(name_)) waits(name_);
  }

  // Call it after the operation: what that has resized on the host is resized on the device.
  void follow_sizes() const {
    for (const auto& [tensor, host] : pairs_) {
      if (host.sizes() == tensor.sizes() && host.strides() == tensor.strides()) continue;
      if (host.storage().data() != tensor.storage().data()) {
        auto moved = share(host.storage(), tensor.device(), &memory);
        auto storage = tensor.storage();
        storage.set_nbytes(moved.nbytes());
        storage.set_data_ptr(std::move(moved.unsafeGetStorageImpl()->mutable_data_ptr()));
      }
      tensor.unsafeGetTensorImpl()->set_storage_offset(host.storage_offset());
      tensor.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides());
    }
  }

 private:
  Tensor lower(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      // one number of the host may stand beside tensors of the device
      on_host_ |= tensor.dim() > 0;
      return tensor;
    }
    TORCH_CHECK(
        !on_device_ || device_ == tensor.device(),
        "Expected all tensors to be on the same device, but found at least two devices, ", device_, " and ",
        tensor.device(), "! (", name_, ")");
    on_device_ = true;
    device_ = tensor.device();
    for (const auto& [known, host] : pairs_)
      if (known.is_same(tensor)) return host;
    pairs_.emplace_back(tensor, ::on_host(tensor));
    return pairs_.back().second;
  }

  Tensor raise(const Tensor& tensor) const {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (const auto& [known, host] : pairs_)
      if (host.is_same(tensor)) return known;
    return ::on_device(tensor, device_);
  }

  std::string name_;
  Device device_ = this_device();
  bool on_device_ = false, on_host_ = false;
  // tensors of the device, and the same memory as tensors of the host
  std::vector<std::pair<Tensor, Tensor>> pairs_;
};

// Every operation that has no kernel of its own below.
void run_on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  HostCall call(c10::toString(op.operator_name()));
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); ++i)
    (*stack)[i] = call.lower(std::move((*stack)[i]));
  call.check();
  {
    BelowAutograd below;
    op.callBoxed(stack);
  }
  call.follow_sizes();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i)
    (*stack)[i] = call.raise(std::move((*stack)[i]));
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
  BelowAutograd below;
  Tensor to = host_view(self);
  const bool leaves = from.is_cuda() && !self.is_cuda(), arrives = self.is_cuda() && !from.is_cuda();
  const bool is_late = non_blocking && leaves && is_pinned(self.data_ptr()) && self.is_contiguous();
  if (is_late) {
    std::lock_guard<std::mutex> guard(late_lock);
    late_copies.emplace_back(self.detach(), host_view(from).to(self.scalar_type(), false, /*copy=*/true));
    std::memset(self.data_ptr(), 0xFF, self.nbytes());
    return self;
  }
  // a copy from ordinary memory, too, holds the host up until it has left it
  const bool is_unnoticed = arrives && non_blocking && is_pinned(from.data_ptr());
  if ((leaves || arrives) && !is_unnoticed && self.numel() > 0) waits("copy between host and device");
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

// Rows of a span, [rows, heads, D] as the packed kernels have them, as a batch of one for the CPU's kernel.
Tensor span(const Tensor& x, const Tensor& limits, int64_t i) {
  const auto* edge = limits.data_ptr<int>();
  // in fp32, as the real kernels add up; the CPU's adds in 16 bits
  return x.slice(0, edge[i], edge[i + 1]).transpose(0, 1).unsqueeze(0).to(at::kFloat).contiguous();
}

// What the last queries see of a span: as FlashAttention, aligned at the ends. None where all see all.
std::optional<Tensor> mask_of(const Tensor& q, const Tensor& k, bool causal) {
  if (!causal) return std::nullopt;
  const auto rows = q.size(2), keys = k.size(2);
  const auto future = at::ones({rows, keys}, at::kBool).triu(keys - rows + 1);
  return at::zeros({1, 1, rows, keys}, q.options()).masked_fill(future, -std::numeric_limits<double>::infinity());
}

using Flash = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Flash flash(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cu_q,
    const std::optional<Tensor>& cu_k, c10::SymInt, c10::SymInt, double dropout, bool causal, bool,
    std::optional<double> scale, std::optional<c10::SymInt>, std::optional<c10::SymInt>, const std::optional<Tensor>&,
    const std::optional<Tensor>&, const std::optional<Tensor>&, std::optional<int64_t>) {
  for (const auto* x : {&q, &k, &v}) check_flash(*x);
  TORCH_CHECK(cu_q && cu_k && cu_q->is_cuda() && cu_k->is_cuda(), "only packed spans, with limits on the device");
  const auto limits_q = on_host(*cu_q), limits_k = on_host(*cu_k);
  std::vector<Tensor> outs, sums;
  for (int64_t i = 0; i + 1 < limits_q.numel(); ++i) {
    const auto qi = span(on_host(q), limits_q, i), ki = span(on_host(k), limits_k, i), vi = span(on_host(v), limits_k, i);
    auto [out, lse] =
        at::_scaled_dot_product_flash_attention_for_cpu(qi, ki, vi, dropout, false, mask_of(qi, ki, causal), scale);
    outs.push_back(out[0].transpose(0, 1));
    sums.push_back(lse[0]);
  }
  const auto none = at::empty({0}, q.options().dtype(at::kLong));
  return {on_device(at::cat(outs).to(q.scalar_type()), q.device()), on_device(at::cat(sums, 1), q.device()), none, none, none};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor& cu_q, const Tensor& cu_k, c10::SymInt, c10::SymInt, double dropout, bool causal, const Tensor&,
    const Tensor&, std::optional<double> scale, std::optional<c10::SymInt>, std::optional<c10::SymInt>) {
  for (const auto* x : {&dout, &q, &k, &v, &out}) check_flash(*x);
  TORCH_CHECK(lse.is_cuda() && lse.scalar_type() == at::kFloat, "logsumexp must be fp32 on the device");
  TORCH_CHECK(lse.is_contiguous() && lse.size(0) == q.size(1) && lse.size(1) == q.size(0), "lse is [heads, rows]");
  const auto limits_q = on_host(cu_q), limits_k = on_host(cu_k);
  std::vector<Tensor> dqs, dks, dvs;
  for (int64_t i = 0; i + 1 < limits_q.numel(); ++i) {
    const auto qi = span(on_host(q), limits_q, i), ki = span(on_host(k), limits_k, i), vi = span(on_host(v), limits_k, i);
    const auto* edge = limits_q.data_ptr<int>();
    const auto sums = on_host(lse).slice(1, edge[i], edge[i + 1]).unsqueeze(0).contiguous();
    auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        span(on_host(dout), limits_q, i), qi, ki, vi, span(on_host(out), limits_q, i), sums, dropout, false,
        mask_of(qi, ki, causal), scale);
    dqs.push_back(dq[0].transpose(0, 1));
    dks.push_back(dk[0].transpose(0, 1));
    dvs.push_back(dv[0].transpose(0, 1));
  }
  const auto all = [&](const std::vector<Tensor>& parts) {
    return on_device(at::cat(parts).to(q.scalar_type()), q.device());
  };
  return {all(dqs), all(dks), all(dvs)};
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
  m.impl("_flash_attention_forward", &flash);
  m.impl("_flash_attention_backward", &flash_backward);
}

}  // namespace
