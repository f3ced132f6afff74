// Times the candidates of problems on this GPU, for fit_costs.py.
//
//   fit_costs [--repeats N] [--most N] [--within X] < PROBLEMS
//
// PROBLEMS: one a line, see fit_costs.h. --repeats: times of which the median counts (9). --most,
// --within: only so many candidates of a problem, and only those that are expected to take at most
// X times as long as the cheapest (0, 0: all).
// Writes a line of JSON about the GPU, then one for each candidate. Exit status 2, and one
// sentence, if nothing can be timed.
//
// A time is that of a CUDA graph of many launches, over their number: as in a network, a kernel
// may start before the one before it has finished. Where input and output are more than half of
// the L2 cache, launches take turns with copies of them that together are twice the cache; smaller
// ones stay in it, as between the layers of a network.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <optional>
#include <utility>

#include "conv_pool/conv_pool.h"
#include "device/element.cuh"
#include "fit_costs.h"
#include "kernels.h"
#include "product/gemm.h"

using namespace torch_mbv2;

namespace {

constexpr float kGraphMilliseconds = 0.4f;  // of a graph, about
constexpr int kMostLaunches = 200;          // of a graph
// Candidates that are this much slower than the best are timed once.
constexpr double kHopeless = 4;
constexpr Clamp kReLU6 = {0, 6};

struct CudaError : std::runtime_error {
  CudaError(const char* what, cudaError_t error)
      : std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error)), code(error) {}
  cudaError_t code;
};

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw CudaError(what, error);
}

struct Settings {
  int repeats = 9;
  size_t most = 0;
  double within = 0;
};

// ---------------------------------------------------------------------------------------- kernels

// Values in [-1, 1).
template <typename T>
__global__ void fill(T* data, size_t count, uint32_t seed) {
  const size_t step = size_t(gridDim.x) * blockDim.x;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    uint32_t x = uint32_t(i) * 2654435761u + seed;
    x = (x ^ (x >> 15)) * 2246822519u;
    x = (x ^ (x >> 13)) * 3266489917u;
    data[i] = from_float<T>(float(x >> 8) * (2.0f / 16777216.0f) - 1.0f);
  }
}

// Clocks and nanoseconds of about so many clocks.
__global__ void spin(long long clocks, long long* out) {
  long long start, end;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  const long long first = clock64();
  long long last = first;
  while (last - first < clocks) last = clock64();
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(end));
  out[0] = last - first;
  out[1] = end - start;
}

// ----------------------------------------------------------------------------------------- memory

class Buffer {
 public:
  Buffer(size_t bytes, DType dtype, uint32_t seed) {
    check(cudaMalloc(&data_, std::max<size_t>(bytes, 16)), "memory for a problem");
    if (dtype == DType::kFloat32) {
      fill<<<1024, 256>>>(static_cast<float*>(data_), bytes / 4, seed);
    } else {
      fill<<<1024, 256>>>(static_cast<__half*>(data_), bytes / 2, seed);
    }
  }
  Buffer(Buffer&& other) : data_(std::exchange(other.data_, nullptr)) {}
  ~Buffer() { cudaFree(data_); }
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Bytes of what a problem reads and writes.
struct Sizes {
  DType dtype;
  int64_t input, weights, bias, output;
};

Sizes sizes_of(const plan::BlockProblem& p) {
  const int64_t source =
      p.image ? int64_t(fit_costs::kImageSize) * fit_costs::kImageSize : int64_t(p.e_h) * p.e_w;
  const int64_t channels = p.source_channels == 0 ? p.expanded : p.source_channels;
  return {p.dtype, 2 * p.batch * source * channels, plan::plan_block_layout(p).packed_bytes, 0,
          2 * p.batch * p.out_h * p.out_w * p.out_channels};
}

Sizes sizes_of(const plan::ProductProblem& p) {
  const int64_t bytes = bytes_of(p.dtype);
  return {p.dtype, bytes * p.m * p.k, bytes * p.n * p.k, bytes * p.n, bytes * p.m * p.n};
}

Sizes sizes_of(const plan::ConvPoolProblem& p) {
  const int64_t bytes = p.element_bytes;
  return {bytes == 4 ? DType::kFloat32 : DType::kFloat16, bytes * p.batch * p.pixels * p.k,
          bytes * p.n * p.k, bytes * p.n, bytes * p.batch * p.n};
}

// What a problem reads and writes; of inputs and outputs as many as launches take turns with.
struct Memory {
  Memory(const Sizes& sizes, int64_t cache_bytes)
      : weights(size_t(sizes.weights), sizes.dtype, 1), bias(size_t(sizes.bias), sizes.dtype, 2) {
    const int64_t moved = sizes.input + sizes.output;
    const int64_t copies = 2 * moved > cache_bytes ? 2 * cache_bytes / moved + 1 : 1;
    for (int64_t i = 0; i < copies; ++i) {
      inputs.emplace_back(size_t(sizes.input), sizes.dtype, uint32_t(3 + i));
      outputs.emplace_back(size_t(sizes.output), sizes.dtype, 0);
    }
    check(cudaDeviceSynchronize(), "filling memory");
  }

  Buffer weights, bias;
  std::vector<Buffer> inputs, outputs;
};

// --------------------------------------------------------------------------------------- launches

// Adds the launch on one of the copies.
using AddLaunch = std::function<cudaError_t(size_t copy, LaunchQueue& queue)>;

AddLaunch launch_of(const plan::BlockProblem& problem, const fit_costs::Candidate& candidate,
                    const Memory& memory, const Device& device) {
  BlockParams p{};
  p.packed = memory.weights.get();
  p.problem = problem;
  p.height = problem.image ? fit_costs::kImageSize : problem.e_h;
  p.width = problem.image ? fit_costs::kImageSize : problem.e_w;
  p.in_channels = problem.source_channels == 0 ? problem.expanded : problem.source_channels;
  p.residual = !problem.image && problem.stride_h == 1 && p.in_channels == problem.out_channels;
  p.image_dtype = problem.dtype;
  p.stride_c = 1;
  p.stride_w = p.in_channels;
  p.stride_h = p.stride_w * p.width;
  p.stride_n = int64_t(p.stride_h) * p.height;
  const plan::BlockPlan plan =
      plan::plan_block(problem, device, std::get<plan::BlockCut>(candidate.choice),
                       plan::architecture_of(device.arch).block);
  return [p, plan, &memory](size_t copy, LaunchQueue& queue) mutable {
    p.input = memory.inputs[copy].get();
    p.output = memory.outputs[copy].get();
    return inverted_residual(p, plan, queue);
  };
}

AddLaunch launch_of(const plan::ProductProblem& problem, const fit_costs::Candidate& candidate,
                    const Memory& memory, const Device&) {
  GemmParams p = {
      nullptr, memory.weights.get(), memory.bias.get(), nullptr, problem.m, problem.n, problem.k, 1,
      kReLU6,  problem.dtype};
  const auto plan = std::get<plan::ProductPlan>(candidate.choice);
  return [p, plan, &memory](size_t copy, LaunchQueue& queue) mutable {
    p.a = memory.inputs[copy].get();
    p.output = memory.outputs[copy].get();
    return gemm(p, plan, queue);
  };
}

AddLaunch launch_of(const plan::ConvPoolProblem& problem, const fit_costs::Candidate& candidate,
                    const Memory& memory, const Device&) {
  ConvPoolParams p{};
  p.weight = memory.weights.get();
  p.bias = memory.bias.get();
  p.batch = problem.batch;
  p.pixels = problem.pixels;
  p.k = problem.k;
  p.n = problem.n;
  p.act = kReLU6;
  p.dtype = sizes_of(problem).dtype;
  const auto plan = std::get<plan::ConvPoolPlan>(candidate.choice);
  return [p, plan, &memory](size_t copy, LaunchQueue& queue) mutable {
    p.input = memory.inputs[copy].get();
    p.output = memory.outputs[copy].get();
    return conv_pool(p, plan, queue);
  };
}

// ------------------------------------------------------------------------------------------ times

class Timer {
 public:
  Timer() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
    check(cudaEventCreate(&start_), "an event");
    check(cudaEventCreate(&end_), "an event");
    check(cudaMallocHost(&spun_, 2 * sizeof(long long)), "host memory");
    for (int i = 0; i < 500; ++i) clock_megahertz();  // until the clocks are up
  }
  ~Timer() {
    cudaFreeHost(spun_);
    cudaEventDestroy(end_);
    cudaEventDestroy(start_);
    cudaStreamDestroy(stream_);
  }

  // Microseconds of a launch: the median of so many graphs, or of fewer where the first run is
  // more than `hopeless` microseconds.
  double time(const AddLaunch& add, size_t copies, int repeats, double hopeless) {
    StreamQueue queue(stream_);
    check(add(0, queue), "a launch");
    check(cudaStreamSynchronize(stream_), "a kernel");
    const int few = 3;
    const float estimate = milliseconds([&] { launch_all(add, copies, few, queue); }) / few;
    const int launches =
        std::clamp(int(kGraphMilliseconds / estimate),
                   std::max(few, int(std::min<size_t>(copies, kMostLaunches))), kMostLaunches);
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "a capture");
    std::optional<std::runtime_error> refused;
    try {
      launch_all(add, copies, launches, queue);
    } catch (const std::runtime_error& error) {
      refused = error;
    }
    cudaGraph_t graph = nullptr;
    const cudaError_t captured = cudaStreamEndCapture(stream_, &graph);
    if (refused) throw *refused;
    check(captured, "a capture");
    const std::unique_ptr<CUgraph_st, void (*)(cudaGraph_t)> owned_graph(
        graph, [](cudaGraph_t g) { cudaGraphDestroy(g); });
    cudaGraphExec_t runnable = nullptr;
    check(cudaGraphInstantiate(&runnable, graph, 0), "a graph");
    const std::unique_ptr<CUgraphExec_st, void (*)(cudaGraphExec_t)> owned_runnable(
        runnable, [](cudaGraphExec_t g) { cudaGraphExecDestroy(g); });
    const auto run = [&] { check(cudaGraphLaunch(runnable, stream_), "a graph's launch"); };
    const double first = 1e3 * milliseconds(run) / launches;
    if (hopeless > 0 && first > hopeless) return first;
    std::vector<double> times(repeats);
    for (double& time : times) time = 1e3 * milliseconds(run) / launches;
    std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
    return times[repeats / 2];
  }

  double clock_megahertz() {
    spin<<<1, 1, 0, stream_>>>(300'000, spun_);
    check(cudaStreamSynchronize(stream_), "measuring the clock");
    return spun_[1] > 0 ? 1e3 * double(spun_[0]) / double(spun_[1]) : 0;
  }

 private:
  static void launch_all(const AddLaunch& add, size_t copies, int launches, LaunchQueue& queue) {
    for (int i = 0; i < launches; ++i) check(add(size_t(i) % copies, queue), "a launch");
  }

  template <typename Run>
  float milliseconds(Run&& run) {
    check(cudaEventRecord(start_, stream_), "an event");
    run();
    check(cudaEventRecord(end_, stream_), "an event");
    check(cudaEventSynchronize(end_), "a kernel");
    float passed = 0;
    check(cudaEventElapsedTime(&passed, start_, end_), "an event");
    return std::max(passed, 1e-4f);
  }

  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, end_ = nullptr;
  long long* spun_ = nullptr;
};

// -------------------------------------------------------------------------------------------- all

// Those to time, the cheapest first.
std::vector<fit_costs::Candidate> likely(std::vector<fit_costs::Candidate> all,
                                         const Settings& settings) {
  std::stable_sort(all.begin(), all.end(),
                   [](const auto& a, const auto& b) { return a.clocks < b.clocks; });
  size_t kept = all.size();
  if (settings.most > 0) kept = std::min(kept, settings.most);
  while (settings.within > 0 && kept > 1 &&
         all[kept - 1].clocks > settings.within * all[0].clocks) {
    --kept;
  }
  all.resize(kept);
  return all;
}

void time_problem(const std::string& text, const Settings& settings, const Device& device,
                  int64_t cache_bytes, Timer& timer) {
  const fit_costs::Problem problem = fit_costs::parse_problem(text);
  const Sizes sizes = std::visit([](const auto& p) { return sizes_of(p); }, problem);
  std::optional<Memory> memory;
  try {
    memory.emplace(sizes, cache_bytes);
  } catch (const CudaError& error) {
    if (error.code != cudaErrorMemoryAllocation) throw;
    std::printf("{\"problem\": \"%s\", \"error\": \"it does not fit the GPU's memory\"}\n",
                text.c_str());
    return;
  }
  double best = 0;
  const auto costs = plan::architecture_of(device.arch);
  for (const auto& candidate : likely(fit_costs::candidates(problem, device, costs), settings)) {
    const AddLaunch add = std::visit(
        [&](const auto& p) { return launch_of(p, candidate, *memory, device); }, problem);
    std::printf("{\"problem\": \"%s\", \"candidate\": \"%s\", \"clocks\": %.9g, ", text.c_str(),
                candidate.name.c_str(), candidate.clocks);
    try {
      const double time =
          timer.time(add, memory->inputs.size(), settings.repeats, kHopeless * best);
      best = best == 0 ? time : std::min(best, time);
      std::printf("\"microseconds\": %.6g, \"megahertz\": %.5g}\n", time, timer.clock_megahertz());
    } catch (const CudaError& error) {
      std::printf("\"error\": \"%s\"}\n", error.what());
      // What a kernel did wrong stays wrong for this process, other than a launch that is refused.
      if (cudaDeviceSynchronize() != cudaSuccess) {
        throw std::runtime_error(std::string(error.what()) + ", in " + text + ", " +
                                 candidate.name);
      }
    }
    std::fflush(stdout);
  }
}

Settings parse_settings(int argc, char** argv) {
  Settings settings;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    const double value = i + 1 < argc ? std::atof(argv[i + 1]) : -1;
    if (name == "--repeats" && value >= 1) {
      settings.repeats = int(value);
    } else if (name == "--most" && value >= 0) {
      settings.most = size_t(value);
    } else if (name == "--within" && value >= 0) {
      settings.within = value;
    } else {
      throw std::runtime_error("the arguments are [--repeats N] [--most N] [--within X], not " +
                               name);
    }
  }
  return settings;
}

void run(int argc, char** argv) {
  const Settings settings = parse_settings(argc, argv);
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    throw std::runtime_error(std::string("there is no GPU that CUDA can use: ") +
                             cudaGetErrorString(error));
  }
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "the GPU");
  const Device device = current_device();
  if (device.arch == 0) {
    throw std::runtime_error("this program was not built for " + std::string(properties.name) +
                             ", whose compute capability is " + std::to_string(properties.major) +
                             "." + std::to_string(properties.minor));
  }
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "the driver");
  check(cudaRuntimeGetVersion(&runtime), "the runtime");
  std::printf(
      "{\"name\": \"%s\", \"arch\": %d, \"multiprocessors\": %d, \"shared_per_block\": %d, "
      "\"shared_per_multiprocessor\": %d, \"cache_bytes\": %d, \"driver\": %d, \"runtime\": %d}\n",
      properties.name, device.arch, device.multiprocessors, device.shared_per_block,
      device.shared_per_multiprocessor, properties.l2CacheSize, driver, runtime);
  Timer timer;
  for (std::string line; std::getline(std::cin, line);) {
    time_problem(line, settings, device, properties.l2CacheSize, timer);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "fit_costs: %s\n", error.what());
    return 2;
  }
  return 0;
}
