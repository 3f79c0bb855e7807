// NCCL's collectives by gloo.

#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <functional>

#include "device_memory.h"

namespace {

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
    for (auto& step : last_steps_) step();
    for (auto& [tensor, own] : results_) tensor.copy_(own);
    works_.clear();
    finish();
    return true;
  }

  // Done to the collective's own memory before the results appear, in order.
  void at_last(std::function<void()> step) {
    last_steps_.push_back(std::move(step));
  }

 private:
  // A result in the memory of an input, as in a reduction in place.
  bool is_read(const Tensor& result) const {
    for (const auto& [tensor, before] : inputs_)
      if (result.storage().data() == tensor.storage().data()) return true;
    return false;
  }

  std::vector<std::pair<Tensor, Tensor>> results_, inputs_;
  std::vector<c10::intrusive_ptr<c10d::Work>> works_;
  std::vector<std::function<void()>> last_steps_;
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
    return run([&](UnderWay& work) { gather_all(work, output, input, options); });
  }
  Work allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    return run([&](UnderWay& work) {
      for (size_t i = 0; i < inputs.size(); ++i) gather_all(work, outputs[i], inputs[i], options);
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
  void gather_all(
      UnderWay& work, const Tensor& output, const Tensor& input, const c10d::AllgatherOptions& options) {
    auto in = work.reads(lowered(input)), out = work.writes(lowered(output));
    work.add(gloo_->_allgather_base(out, in, options));
  }
  void reduce_all(UnderWay& work, Tensor own, c10d::ReduceOp operation) {
    const bool mean = operation == c10d::ReduceOp::AVG;
    c10d::AllreduceOptions options;
    options.reduceOp = mean ? c10d::ReduceOp(c10d::ReduceOp::SUM) : operation;
    Tensors one{own};
    work.add(gloo_->allreduce(one, options));
    if (mean) work.at_last([own, size = getSize()]() mutable { own.div_(size); });
  }
  // By a sum of everything: right, not fast.
  void scatter_sum(UnderWay& work, Tensor& output, Tensor& input, c10d::ReduceOp operation) {
    auto all = work.reads(lowered(input));
    auto own = work.writes(lowered(output));
    auto sum = all.clone();
    reduce_all(work, sum, operation);
    work.at_last([own, sum, size = getSize(), rank = getRank()]() mutable {
      own.view(-1).copy_(sum.view({size, -1})[rank]);
    });
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
