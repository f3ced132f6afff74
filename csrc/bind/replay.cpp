#include "bind/replay.h"

#include <algorithm>
#include <atomic>
#include <list>
#include <mutex>

namespace torch_mbv2::bind {
namespace {

constexpr size_t kMostReplays = 32;
// Larger networks are no faster replayed: the GPU takes longer than their launches.
constexpr int64_t kMostScratch = int64_t(64) << 20;
constexpr int64_t kMostScratchOfAll = int64_t(512) << 20;

// While it lives, calls of this thread that a capture in another thread would forbid do not end
// that capture.
class RelaxedCaptures {
 public:
  RelaxedCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A graph of a network's launches with scratch memory of its own. Launches of it in one stream
// follow each other, so they may share that.
class Replay {
 public:
  Replay(std::shared_ptr<const NetworkPlan> plan, unsigned long long stream, const char* weights,
         int device)
      : plan_(std::move(plan)), stream_(stream), weights_(weights), device_(device) {}
  Replay(const Replay&) = delete;
  // A graph that still runs goes when it is done.
  ~Replay() {
    const RelaxedCaptures relaxed;
    if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
  }

  bool serves(const NetworkPlan* plan, unsigned long long stream, const char* weights) const {
    return plan_.get() == plan && stream_ == stream && weights_ == weights;
  }
  // Whether there is a graph, and not only a note that it was asked for.
  bool is_made() const { return made_; }
  // Also of a note, which the next call may make a graph of.
  int64_t scratch_bytes() const { return failed_ ? 0 : plan_->scratch_bytes; }

  cudaError_t launch(Bases bases, cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (failed_) return cudaErrorNotSupported;
    const cudaError_t error = made_ ? update(bases) : make(bases);
    if (error != cudaSuccess) {  // nodes may be in between: this graph is never launched again
      failed_ = true;
      made_ = false;
      scratch_.reset();
      return error;
    }
    made_ = true;
    return cudaGraphLaunch(exec_, stream);
  }

 private:
  Bases with_scratch(Bases bases) const {
    bases[kScratchBase] = scratch_ ? static_cast<char*>(scratch_->data_ptr()) : nullptr;
    return bases;
  }

  cudaError_t make(const Bases& outer) {
    if (plan_->scratch_bytes > 0) {
      scratch_ =
          empty_tensor(device_, ScalarType::Byte, {plan_->scratch_bytes}, Layout::kContiguous);
    }
    const Bases bases = with_scratch(outer);
    const RelaxedCaptures relaxed;
    cudaStream_t stream = nullptr;
    cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error != cudaSuccess) return error;
    error = capture(bases, stream);
    cudaStreamDestroy(stream);
    if (error == cudaSuccess) error = find_nodes(bases);
    if (error == cudaSuccess) error = cudaGraphInstantiate(&exec_, graph_, 0);
    last_ = outer;
    return error;
  }

  cudaError_t capture(const Bases& bases, cudaStream_t stream) {
    cudaError_t error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);
    if (error != cudaSuccess) return error;
    for (const PlannedLaunch& planned : plan_->launches) {
      alignas(16) unsigned char data[Launch::kMostBytes];
      planned.fill(bases, data);
      error = launch_with(planned.launch, data, stream);
      if (error != cudaSuccess) break;
    }
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph_);
    return error == cudaSuccess ? ended : error;
  }

  // The nodes of the launches whose pointers change, found by their arguments.
  cudaError_t find_nodes(const Bases& bases) {
    size_t count = 0;
    cudaError_t error = cudaGraphGetNodes(graph_, nullptr, &count);
    std::vector<cudaGraphNode_t> nodes(count);
    if (error == cudaSuccess) error = cudaGraphGetNodes(graph_, nodes.data(), &count);
    if (error != cudaSuccess) return error;
    std::vector<cudaKernelNodeParams> params(count);
    for (size_t i = 0; i < count; ++i) {
      error = cudaGraphKernelNodeGetParams(nodes[i], &params[i]);
      if (error != cudaSuccess) return error;
    }
    for (const PlannedLaunch& planned : plan_->launches) {
      if (!planned.is_outer()) continue;
      alignas(16) unsigned char data[Launch::kMostBytes];
      planned.fill(bases, data);
      size_t i = 0;
      while (i < count && !is_same(planned.launch, data, params[i])) ++i;
      if (i == count) return cudaErrorInvalidValue;
      outer_.push_back({&planned, nodes[i], params[i].func});
      params[i].kernelParams = nullptr;  // taken
    }
    return cudaSuccess;
  }

  static bool is_same(const Launch& launch, const unsigned char* data,
                      const cudaKernelNodeParams& params) {
    if (params.kernelParams == nullptr) return false;
    if (params.gridDim.x != launch.grid.x || params.gridDim.y != launch.grid.y ||
        params.gridDim.z != launch.grid.z || params.blockDim.x != launch.block.x) {
      return false;
    }
    for (int i = 0; i < launch.arguments; ++i) {
      if (std::memcmp(params.kernelParams[i], data + launch.argument_at[i],
                      launch.argument_bytes[i]) != 0) {
        return false;
      }
    }
    return true;
  }

  cudaError_t update(const Bases& outer) {
    if (outer == last_) return cudaSuccess;
    const Bases bases = with_scratch(outer);
    for (const Outer& node : outer_) {
      const Launch& launch = node.planned->launch;
      alignas(16) unsigned char data[Launch::kMostBytes];
      node.planned->fill(bases, data);
      void* arguments[Launch::kMostArguments];
      for (int i = 0; i < launch.arguments; ++i) arguments[i] = data + launch.argument_at[i];
      cudaKernelNodeParams params{};
      params.func = node.function;
      params.gridDim = launch.grid;
      params.blockDim = launch.block;
      params.sharedMemBytes = unsigned(launch.shared_bytes);
      params.kernelParams = arguments;
      const cudaError_t error = cudaGraphExecKernelNodeSetParams(exec_, node.node, &params);
      if (error != cudaSuccess) return error;
    }
    last_ = outer;
    return cudaSuccess;
  }

  struct Outer {
    const PlannedLaunch* planned;
    cudaGraphNode_t node;
    void* function;
  };

  const std::shared_ptr<const NetworkPlan> plan_;
  const unsigned long long stream_;
  const char* const weights_;
  const int device_;

  std::mutex mutex_;
  std::atomic<bool> failed_ = false;
  std::atomic<bool> made_ = false;
  std::optional<Tensor> scratch_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
  std::vector<Outer> outer_;
  Bases last_{};
};

// Of all threads, the last used first. Never destroyed: at the end of a process CUDA may be gone.
struct Kept {
  std::mutex mutex;
  std::list<std::shared_ptr<Replay>> replays;
};
Kept& kept() {
  static Kept* const all = new Kept;
  return *all;
}

int64_t scratch_of(const std::list<std::shared_ptr<Replay>>& replays) {
  int64_t bytes = 0;
  for (const auto& r : replays) bytes += r->scratch_bytes();
  return bytes;
}

}  // namespace

bool replay(const std::shared_ptr<const NetworkPlan>& plan, const Bases& bases, int device,
            cudaStream_t stream) {
  if (plan->launches.size() < 2 || plan->scratch_bytes > kMostScratch) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  if (status != cudaStreamCaptureStatusNone) return false;
  // Unlike its handle, a stream's number is never used again.
  unsigned long long id = 0;
  if (cudaStreamGetId(stream, &id) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  std::shared_ptr<Replay> found;
  std::list<std::shared_ptr<Replay>> dropped;  // destroyed after the lock
  {
    Kept& all = kept();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto at = std::find_if(all.replays.begin(), all.replays.end(), [&](const auto& r) {
      return r->serves(plan.get(), id, bases[kWeightsBase]);
    });
    if (at == all.replays.end()) {
      // The first time: launched one by one, as networks that run once should be.
      all.replays.push_front(std::make_shared<Replay>(plan, id, bases[kWeightsBase], device));
      while (all.replays.size() > kMostReplays || scratch_of(all.replays) > kMostScratchOfAll) {
        dropped.splice(dropped.end(), all.replays, std::prev(all.replays.end()));
      }
      return false;
    }
    all.replays.splice(all.replays.begin(), all.replays, at);
    found = *at;
  }
  if (found->launch(bases, stream) == cudaSuccess) return true;
  cudaGetLastError();  // the launches, one by one, say what is wrong
  return false;
}

ReplayTotals replay_totals() {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  ReplayTotals totals{};
  for (const auto& r : all.replays) {
    if (!r->is_made()) continue;
    ++totals.graphs;
    totals.scratch_bytes += r->scratch_bytes();
  }
  return totals;
}

void drop_replays() {
  std::list<std::shared_ptr<Replay>> dropped;
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  dropped.swap(all.replays);
}

}  // namespace torch_mbv2::bind
