// network: a chain of our kernels in one call; and what tells of it.
#include <mutex>

#include "bind/network_plan.h"
#include "bind/op.h"
#include "bind/replay.h"

namespace torch_mbv2::bind {
namespace {

// What a plan depends on.
struct NetworkKey {
  std::string program;
  ScalarType type;
  int device;
  Ints sizes, strides;
  uintptr_t alignment;
  int64_t weights_bytes;

  // The program, which is long, last.
  bool operator==(const NetworkKey& o) const {
    return type == o.type && device == o.device && sizes == o.sizes && strides == o.strides &&
           alignment == o.alignment && weights_bytes == o.weights_bytes && program == o.program;
  }
};

// The plan for a key, made if it is not there, the last used first.
std::shared_ptr<const NetworkPlan> find_plan(NetworkKey key, const Value& input) {
  struct Entry {
    NetworkKey key;
    std::shared_ptr<const NetworkPlan> plan;
  };
  constexpr size_t kMostPlans = 64;
  static std::mutex mutex;
  static std::vector<Entry> entries;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto at =
        std::find_if(entries.begin(), entries.end(), [&](const Entry& e) { return e.key == key; });
    if (at != entries.end()) {
      std::rotate(entries.begin(), at, at + 1);
      return entries.front().plan;
    }
  }
  const auto plan = std::make_shared<const NetworkPlan>(
      plan_network(key.program, input, key.weights_bytes, current_device(), true));
  const std::lock_guard<std::mutex> lock(mutex);
  entries.insert(entries.begin(), Entry{std::move(key), plan});
  if (entries.size() > kMostPlans) entries.pop_back();
  return plan;
}

Tensor network(Tensor input, Tensor weights, std::string program) {
  const char* op = "network";
  const Value x = value_of(input), w = value_of(weights);
  check_float(op, x);
  if (w.type != ScalarType::Byte || w.dim() != 1 || !is_dense(w, Layout::kContiguous)) {
    fail(op, "weights must be uint8 of shape (L,), contiguous, got ", name(w.type), " of ",
         shape(w));
  }
  if (w.device != x.device) {
    fail(op, "weights must be on the device of input, ", device(x), ", got ", device(w));
  }
  if (w.numel() > 0 && !is_aligned16(w.data)) {
    fail(op, "weights must start at a multiple of 16 bytes");
  }

  const torch::stable::accelerator::DeviceGuard guard(x.device);
  const auto plan = find_plan({std::move(program), x.type, x.device, x.sizes, x.strides,
                               reinterpret_cast<uintptr_t>(x.data) % 16, w.numel()},
                              x);
  Tensor output = empty_tensor(x.device, plan->type, plan->sizes, plan->layout);
  if (plan->launches.empty()) return output;
  const cudaStream_t stream = current_stream(x.device);
  Bases bases{};
  bases[kInputBase] = static_cast<char*>(x.data);
  bases[kWeightsBase] = static_cast<char*>(w.data);
  bases[kOutputBase] = static_cast<char*>(output.data_ptr());
  std::vector<Tensor> copies;
  for (const InputCopy& c : plan->copies) {
    copies.push_back(empty_tensor(x.device, c.type, x.sizes, c.layout));
    torch::stable::copy_(copies.back(), input);
    bases[kFirstCopyBase + copies.size() - 1] = static_cast<char*>(copies.back().data_ptr());
  }
  if (replay(plan, bases, x.device, stream)) return output;

  std::optional<Tensor> scratch;
  if (plan->scratch_bytes > 0) {
    scratch = empty_tensor(x.device, ScalarType::Byte, {plan->scratch_bytes}, Layout::kContiguous);
    bases[kScratchBase] = static_cast<char*>(scratch->data_ptr());
  }
  for (const PlannedLaunch& planned : plan->launches) {
    alignas(16) unsigned char data[Launch::kMostBytes];
    planned.fill(bases, data);
    check_launch(op, launch_with(planned.launch, data, stream));
  }
  return output;
}

// What a network would launch for an input of these sizes and strides, a line each: the step, what
// reports call its kernel, thread blocks, threads, bytes of shared memory, thread blocks of a
// cluster, expected clocks (0: unknown). A line "step ! reason" says why something other than the
// op's own kernel runs. `device`: architecture (900), multiprocessors, bytes of shared memory of a
// thread block and of a multiprocessor; empty for the current one.
std::string explain(std::string program, Ints size, Ints stride, std::string dtype, Ints device) {
  const char* op = "explain";
  if (size.size() != stride.size()) {
    fail(op, "size and stride must have as many values, got ", size.size(), " and ", stride.size());
  }
  for (const Ints* values : {&size, &stride, &device}) {
    for (const int64_t value : *values) {
      if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
        fail(op, "numbers must be at least 0 and less than 2147483648, got ", tuple(*values));
      }
    }
  }
  if (!device.empty() && (device.size() != 4 || device[1] < 1)) {
    fail(op, "device must have 4 values, of which the second is at least 1, or none, got ",
         tuple(device));
  }
  const auto type = type_called(dtype);
  if (!type) fail(op, "dtype must be float32, float16 or bfloat16, got ", dtype);
  const Value x{*type, 0, std::move(size), std::move(stride), nullptr, -1};
  const Device target =
      device.empty() ? current_device()
                     : Device{int(device[0]), int(device[1]), int(device[2]), int(device[3])};
  constexpr int64_t kAnyBytes = int64_t(1) << 39;
  const NetworkPlan plan = plan_network(program, x, kAnyBytes, target, false);
  std::ostringstream text;
  for (const Note& note : plan.notes) text << note.step << " ! " << note.reason << '\n';
  for (const PlannedLaunch& p : plan.launches) {
    const Launch& l = p.launch;
    text << p.step << ' ' << l.family << ' ' << int64_t(l.grid.x) * l.grid.y * l.grid.z << ' '
         << l.block.x * l.block.y * l.block.z << ' ' << l.shared_bytes << ' ' << l.cluster << ' '
         << int64_t(l.clocks) << '\n';
  }
  return text.str();
}

// How many CUDA graphs of networks are kept, and the bytes of scratch memory that they hold.
Ints replays() {
  const ReplayTotals totals = replay_totals();
  return {totals.graphs, totals.scratch_bytes};
}

// Forgets them; what replays() said before.
Ints forget_replays() {
  const Ints before = replays();
  drop_replays();
  return before;
}

}  // namespace
}  // namespace torch_mbv2::bind

STABLE_TORCH_LIBRARY_FRAGMENT(torch_mbv2, library) {
  library.def("network(Tensor input, Tensor weights, str program) -> Tensor");
  library.def("explain(str program, int[] size, int[] stride, str dtype, int[] device) -> str");
  library.def("replays() -> int[]");
  library.def("forget_replays() -> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(torch_mbv2, CUDA, library) {
  library.impl("network", TORCH_BOX(&torch_mbv2::bind::network));
}
STABLE_TORCH_LIBRARY_IMPL(torch_mbv2, CompositeExplicitAutograd, library) {
  library.impl("explain", TORCH_BOX(&torch_mbv2::bind::explain));
  library.impl("replays", TORCH_BOX(&torch_mbv2::bind::replays));
  library.impl("forget_replays", TORCH_BOX(&torch_mbv2::bind::forget_replays));
}
