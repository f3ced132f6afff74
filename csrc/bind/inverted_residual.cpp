#include "bind/blocks.h"
#include "bind/conv2d.h"
#include "bind/op.h"

namespace torch_mbv2::bind {

Value inverted_residual(Context& context, Value input, std::optional<Value> expand_weight,
                        std::optional<Value> expand_bias, Value depthwise_weight,
                        std::optional<Value> depthwise_bias, Value project_weight,
                        std::optional<Value> project_bias, std::optional<Value> packed, Ints stride,
                        Ints padding, bool residual, Bound act_min, Bound act_max) {
  const char* op = "inverted_residual";
  check_image(op, input);
  check_channels(op, input);
  const int64_t batch = input.size(0), channels = input.size(1);
  const int64_t height = input.size(2), width = input.size(3);
  if (expand_weight) check_alike(op, "expand_weight", *expand_weight, input);
  check_alike(op, "depthwise_weight", depthwise_weight, input);
  check_alike(op, "project_weight", project_weight, input);
  int64_t expanded = channels;
  if (expand_weight) {
    if (!is_pointwise(*expand_weight, channels)) {
      fail(op, "expand_weight must have shape (E, ", channels, ", 1, 1) from input, got ",
           shape(*expand_weight));
    }
    check_fills(op, "expand_weight", *expand_weight);
    expanded = expand_weight->size(0);
  }
  check_depthwise(op, depthwise_weight, expanded, expand_weight ? "expand_weight" : "input");
  check_project(op, project_weight, expanded);
  if (!expand_weight && expand_bias) {
    fail(op, "expand_bias must be None where expand_weight is None");
  }
  const Like like = {"input", input};
  const int64_t out_channels = project_weight.size(0);
  check_bias(op, expand_bias, expanded, input, "expand_", like);
  check_bias(op, depthwise_bias, expanded, input, "depthwise_", like);
  check_bias(op, project_bias, out_channels, input, "project_", like);
  check_packed(op, packed, input, like);
  check_ints(op, "stride", stride, 2, 1);
  check_ints(op, "padding", padding, 4, 0);
  check_activation(op, act_min, act_max);
  const int64_t kernel_h = depthwise_weight.size(2), kernel_w = depthwise_weight.size(3);
  const int64_t padded_h = height + padding[2] + padding[3];
  const int64_t padded_w = width + padding[0] + padding[1];
  check_kernel_fits(op, padded_h, padded_w, kernel_h, kernel_w);
  const int64_t out_h = (padded_h - kernel_h) / stride[0] + 1;
  const int64_t out_w = (padded_w - kernel_w) / stride[1] + 1;
  check_size(op, "expanded input", expanded, height, width);
  check_size(op, "depthwise output", expanded, out_h, out_w);
  check_size(op, "output", out_channels, out_h, out_w);
  if (residual && (out_channels != channels || out_h != height || out_w != width)) {
    fail(op, "residual needs an output of the shape of input, ", shape(input), ", got ",
         tuple(Ints{batch, out_channels, out_h, out_w}));
  }

  BlockParams p{};
  p.problem =
      block_problem(depthwise_weight, project_weight, stride, padding, clamp(act_min, act_max));
  p.problem.batch = batch;
  p.problem.e_h = p.height = int(height);
  p.problem.e_w = p.width = int(width);
  p.problem.source_channels = expand_weight ? int(channels) : 0;
  p.problem.out_h = int(out_h);
  p.problem.out_w = int(out_w);
  p.in_channels = int(channels);
  p.residual = residual;
  const auto output = run_fused(op, context, p, packed, [&] {
    const Value x = context.dense(input, Layout::kChannelsLast);
    return is_aligned16(x.data) ? x : context.copy(x, x.type, Layout::kChannelsLast);
  });
  if (output) return *output;

  const Ints ones = {1, 1}, none = {0, 0, 0, 0};
  Value y = input;
  // Each map goes when the next one is made.
  const auto step = [&](const Value& next) {
    if (y.handle != input.handle) context.release(y);
    y = next;
  };
  if (expand_weight) {
    step(conv2d(context, y, *expand_weight, expand_bias, ones, none, ones, 1, act_min, act_max));
  }
  step(conv2d(context, y, depthwise_weight, depthwise_bias, stride, padding, ones, expanded,
              act_min, act_max));
  step(conv2d(context, y, project_weight, project_bias, ones, none, ones, 1, std::nullopt,
              std::nullopt));
  if (residual) step(add(context, input, y, std::nullopt, std::nullopt));
  return y;
}

}  // namespace torch_mbv2::bind

TORCH_MBV2_OP(inverted_residual,
              "inverted_residual(Tensor input, Tensor? expand_weight, Tensor? expand_bias, "
              "Tensor depthwise_weight, Tensor? depthwise_bias, Tensor project_weight, "
              "Tensor? project_bias, Tensor? packed, int[2] stride, int[4] padding, bool residual, "
              "float? act_min, float? act_max) -> Tensor")
