#include "bind/network_plan.h"

#include <algorithm>
#include <utility>

#include "bind/op.h"

namespace torch_mbv2::bind {
namespace {

// Ranges of addresses that stand for memory while a network is recorded: one each for the bases
// above, then one for each value of a step.
constexpr int kRangeBits = 40;

char* range_address(int range) {
  return reinterpret_cast<char*>(uintptr_t(range + 1) << kRangeBits);
}
int range_of(const void* address) {
  return int(reinterpret_cast<uintptr_t>(address) >> kRangeBits) - 1;
}
int64_t offset_in_range(const void* address) {
  return int64_t(reinterpret_cast<uintptr_t>(address) & ((uintptr_t(1) << kRangeBits) - 1));
}

constexpr int64_t kAlignment = 256;
int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// From the first to behind the last element, which must fit into a range.
int64_t bytes_of(const Value& x) {
  __int128 last = 0;
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    if (x.size(dim) == 0) return 0;
    last += __int128(x.size(dim) - 1) * x.stride(dim);
  }
  const __int128 bytes = (last + 1) * element_size(x.type);
  if (last < 0 || bytes >> (kRangeBits - 1) != 0) {
    fail("network", "a tensor of shape ", shape(x), " is too large");
  }
  return int64_t(bytes);
}

class RecordingQueue : public LaunchQueue {
 public:
  RecordingQueue(const Device& device, bool live) : LaunchQueue(device), live_(live) {}

  cudaError_t add(Launch& launch) override {
    if (live_) {
      if (const cudaError_t error = allow_shared_memory(launch); error != cudaSuccess) {
        return error;
      }
    }
    launches.push_back({launch, step, {}});
    return cudaSuccess;
  }

  int step = 0;
  std::vector<PlannedLaunch> launches;

 private:
  bool live_;
};

class RecordingContext : public Context {
 public:
  RecordingContext(const Device& device, bool live, const Value& input)
      : queue_(device, live), input_(input) {
    bytes_of(input);
    // The alignment of the input decides how kernels read it.
    input_.data = range_address(kInputBase) + reinterpret_cast<uintptr_t>(input.data) % 16;
    ranges_.resize(kBases);
  }

  Value input() const { return input_; }
  void begin(int step) { queue_.step = step; }

  Value empty(ScalarType type, const Ints& sizes, Layout layout) override {
    const int range = int(ranges_.size());
    const Value x = make(type, sizes, layout, range);
    ranges_.push_back({bytes_of(x)});
    return x;
  }

  Value copy(const Value& x, ScalarType type, Layout layout) override {
    if (x.data != input_.data) {
      fail("network", "step ", queue_.step,
           " of the program would need a copy of a value in another layout");
    }
    size_t i = 0;
    while (i < copies_.size() && (copies_[i].type != type || copies_[i].layout != layout)) ++i;
    if (i == copies_.size()) copies_.push_back({type, layout});
    if (i >= kMostCopies) fail("network", "the program needs too many copies of its input");
    const Value made = make(type, x.sizes, layout, kFirstCopyBase + int(i));
    bytes_of(made);
    return made;
  }

  LaunchQueue& queue() override { return queue_; }
  void note(const std::string& reason) override { notes_.push_back({queue_.step, reason}); }

  NetworkPlan finish(const Value& result) {
    NetworkPlan plan{};
    plan.launches = std::move(queue_.launches);
    plan.copies = std::move(copies_);
    plan.notes = std::move(notes_);
    plan.type = result.type;
    plan.sizes = result.sizes;
    plan.layout = result.strides == strides_of(result.sizes, Layout::kContiguous)
                      ? Layout::kContiguous
                      : Layout::kChannelsLast;
    find_lifetimes(plan);
    place(range_of(result.data), plan);
    relocate(range_of(result.data), plan);
    return plan;
  }

 private:
  struct Range {
    int64_t bytes = 0;
    int first = -1, last = -1;  // launches that use it
    int64_t at = 0;             // in the scratch memory
  };

  Value make(ScalarType type, const Ints& sizes, Layout layout, int range) {
    return {type, input_.device, sizes, strides_of(sizes, layout), range_address(range), range};
  }

  template <typename F>
  static void for_each_pointer(Launch& launch, F&& f) {
    for (int i = 0; i < launch.pointers; ++i) {
      const void* address;
      std::memcpy(&address, launch.data + launch.pointer_at[i], sizeof(address));
      if (address != nullptr) f(launch.pointer_at[i], address);
    }
  }

  void find_lifetimes(NetworkPlan& plan) {
    for (int i = 0; i < int(plan.launches.size()); ++i) {
      for_each_pointer(plan.launches[size_t(i)].launch, [&](uint16_t, const void* address) {
        Range& range = ranges_[size_t(range_of(address))];
        if (range.first < 0) range.first = i;
        range.last = i;
      });
    }
  }

  // Places what steps hand on to steps in one piece of scratch memory: large ones first, each at
  // the lowest place that is free as long as it lives.
  void place(int result, NetworkPlan& plan) {
    std::vector<int> order, placed;
    for (int r = kBases; r < int(ranges_.size()); ++r) {
      if (r != result && ranges_[size_t(r)].first >= 0) order.push_back(r);
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return ranges_[size_t(a)].bytes > ranges_[size_t(b)].bytes;
    });
    for (const int r : order) {
      Range& range = ranges_[size_t(r)];
      std::vector<std::pair<int64_t, int64_t>> taken;
      for (const int other : placed) {
        const Range& o = ranges_[size_t(other)];
        if (o.last >= range.first && o.first <= range.last) {
          taken.push_back({o.at, o.at + aligned(o.bytes)});
        }
      }
      std::sort(taken.begin(), taken.end());
      for (const auto& [from, to] : taken) {
        if (range.at + aligned(range.bytes) <= from) break;
        range.at = std::max(range.at, to);
      }
      plan.scratch_bytes = std::max(plan.scratch_bytes, range.at + aligned(range.bytes));
      placed.push_back(r);
    }
  }

  void relocate(int result, NetworkPlan& plan) {
    const int64_t misaligned = offset_in_range(input_.data);
    for (PlannedLaunch& planned : plan.launches) {
      for_each_pointer(planned.launch, [&](uint16_t at, const void* address) {
        const int range = range_of(address);
        const int64_t offset = offset_in_range(address);
        if (range == kInputBase) {
          planned.relocations.push_back({at, kInputBase, offset - misaligned});
        } else if (range < kBases) {
          planned.relocations.push_back({at, uint16_t(range), offset});
        } else if (range == result) {
          planned.relocations.push_back({at, kOutputBase, offset});
        } else {
          planned.relocations.push_back({at, kScratchBase, ranges_[size_t(range)].at + offset});
        }
      });
    }
  }

  RecordingQueue queue_;
  Value input_;
  std::vector<Range> ranges_;
  std::vector<InputCopy> copies_;
  std::vector<Note> notes_;
};

// What has another shape without being moved must lie dense.
void check_dense(const StepReader& reader, const Value& x) {
  if (!is_dense(x, x.dim() == 4 ? Layout::kChannelsLast : Layout::kContiguous)) {
    reader.refuse("its input must be dense, got strides " + tuple(x.strides));
  }
}

// (N, C) of (N, C, 1, 1), or of what is (N, C) already.
Value flatten(StepReader& reader) {
  reader.expect(1);
  Value x = reader.read<Value>();
  const bool pooled = x.dim() == 4 && x.size(2) == 1 && x.size(3) == 1;
  if (!pooled && x.dim() != 2) {
    reader.refuse("flatten takes (N, C, 1, 1) or (N, C), got " + shape(x));
  }
  check_dense(reader, x);
  x.sizes = {x.size(0), x.size(1)};
  x.strides = strides_of(x.sizes, Layout::kContiguous);
  return x;
}

// (N, C, 1, 1) of (N, C).
Value unflatten(StepReader& reader) {
  reader.expect(1);
  Value x = reader.read<Value>();
  if (x.dim() != 2) reader.refuse("unflatten takes (N, C), got " + shape(x));
  check_dense(reader, x);
  x.sizes = {x.size(0), x.size(1), 1, 1};
  x.strides = strides_of(x.sizes, Layout::kChannelsLast);
  return x;
}

}  // namespace

std::map<std::string, StepFunction>& step_functions() {
  static std::map<std::string, StepFunction> functions;
  return functions;
}

bool PlannedLaunch::is_outer() const {
  return std::any_of(relocations.begin(), relocations.end(), [](const Relocation& r) {
    return r.base != kWeightsBase && r.base != kScratchBase;
  });
}

void PlannedLaunch::fill(const Bases& bases, unsigned char* data) const {
  std::memcpy(data, launch.data, size_t(launch.bytes));
  for (const Relocation& r : relocations) {
    const char* const address = bases[r.base] + r.offset;
    std::memcpy(data + r.at, &address, sizeof(address));
  }
}

NetworkPlan plan_network(std::string_view program, const Value& input, int64_t weights_bytes,
                         const Device& device, bool live) {
  RecordingContext context(device, live, input);
  Value weights{ScalarType::Byte, input.device, {weights_bytes}, {1}, range_address(kWeightsBase),
                kWeightsBase};
  std::vector<Value> values = {context.input()};
  while (program.ends_with('\n')) program.remove_suffix(1);
  if (program.empty()) fail("network", "the program has no step");
  for (const std::string_view line : split(program, '\n')) {
    StepReader reader(line, values, weights);
    context.begin(int(values.size()));
    if (reader.op() == "flatten") {
      values.push_back(flatten(reader));
    } else if (reader.op() == "unflatten") {
      values.push_back(unflatten(reader));
    } else {
      const auto found = step_functions().find(reader.op());
      if (found == step_functions().end()) reader.refuse("there is no such op");
      values.push_back(found->second(context, reader));
    }
  }
  const Value& result = values.back();
  if (range_of(result.data) < kBases) fail("network", "the program hands on its input");
  return context.finish(result);
}

}  // namespace torch_mbv2::bind
