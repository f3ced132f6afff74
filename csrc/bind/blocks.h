// What inverted_residual and stem_block share.
#pragma once

#include "bind/context.h"
#include "plan/plans.h"

namespace torch_mbv2::bind {

inline void check_fills(const char* op, const char* what, const Value& weight) {
  if (weight.size(0) < 1) {
    fail(op, what, " must have at least one output channel, got ", shape(weight));
  }
}

inline void check_depthwise(const char* op, const Value& weight, int64_t channels,
                            const char* source) {
  if (weight.dim() != 4 || weight.size(0) != channels || weight.size(1) != 1) {
    fail(op, "depthwise_weight must have shape (", channels, ", 1, kH, kW) from ", source, ", got ",
         shape(weight));
  }
}

inline void check_project(const char* op, const Value& weight, int64_t channels) {
  if (!is_pointwise(weight, channels)) {
    fail(op, "project_weight must have shape (Cout, ", channels,
         ", 1, 1) from depthwise_weight, got ", shape(weight));
  }
}

inline void check_packed(const char* op, const std::optional<Value>& packed, const Value& input,
                         const Like& like) {
  if (!packed) return;
  check_alike(op, "packed", *packed, input, like);
  if (packed->dim() != 1) fail(op, "packed must have shape (L,), got ", shape(*packed));
}

// What every block says of its depthwise convolution and of what comes after it.
inline plan::BlockProblem block_problem(const Value& depthwise_weight, const Value& project_weight,
                                        const Ints& stride, const Ints& padding, const Clamp& act) {
  plan::BlockProblem p{};
  p.dtype = dtype_of(project_weight);
  p.activation.lo = act.lo;
  p.activation.hi = act.hi;
  p.expanded = int(depthwise_weight.size(0));
  p.out_channels = int(project_weight.size(0));
  p.window_h = int(depthwise_weight.size(2));
  p.window_w = int(depthwise_weight.size(3));
  p.stride_h = int(stride[0]);
  p.stride_w = int(stride[1]);
  p.pad_left = int(padding[0]);
  p.pad_top = int(padding[2]);
  return p;
}

// Runs the fused kernel if it takes the problem with these weights: the output, or nothing, and
// then a note says why. `make_input` gives the input as the kernel reads it.
template <typename MakeInput>
std::optional<Value> run_fused(const char* op, Context& context, BlockParams p,
                               const std::optional<Value>& packed, MakeInput&& make_input) {
  const plan::BlockProblem& problem = p.problem;
  const plan::BlockPlan chosen = plan::plan_for(problem, context.queue().device());
  std::string reason = chosen.reason;
  if (chosen.packed_bytes >= 0 && packed && packed->numel() * 2 != chosen.packed_bytes) {
    fail(op, "packed must have shape (", chosen.packed_bytes / 2,
         ",) for these weights, as torch_mbv2.weights.packing makes it, got ", shape(*packed));
  }
  if (reason.empty() && !packed) reason = "its weights are not packed";
  if (reason.empty() && (!is_dense(*packed, Layout::kContiguous) || !is_aligned16(packed->data))) {
    reason = "its packed weights are not contiguous from a multiple of 16 bytes on";
  }
  if (!reason.empty()) {
    context.note(reason);
    return std::nullopt;
  }
  const Value output = context.empty(
      packed->type, {problem.batch, problem.out_channels, problem.out_h, problem.out_w},
      Layout::kChannelsLast);
  if (output.numel() == 0) return output;
  p.input = make_input().data;
  p.packed = packed->data;
  p.output = output.data;
  check_launch(op, torch_mbv2::inverted_residual(p, chosen, context.queue()));
  return output;
}

}  // namespace torch_mbv2::bind
