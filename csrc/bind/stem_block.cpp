#include "bind/blocks.h"
#include "bind/conv2d.h"
#include "bind/op.h"

namespace torch_mbv2::bind {

Value stem_block(Context& context, Value input, Value stem_weight, std::optional<Value> stem_bias,
                 Value depthwise_weight, std::optional<Value> depthwise_bias, Value project_weight,
                 std::optional<Value> project_bias, std::optional<Value> packed, Ints stem_stride,
                 Ints stem_padding, Ints padding, Bound act_min, Bound act_max) {
  const char* op = "stem_block";
  check_image(op, input);
  check_channels(op, input);
  const int64_t batch = input.size(0), channels = input.size(1);
  const int64_t height = input.size(2), width = input.size(3);
  const Like like = {"stem_weight", stem_weight};
  check_float(op, stem_weight, "stem_weight");
  check_alike(op, "stem_weight", stem_weight, input, like);
  check_alike(op, "depthwise_weight", depthwise_weight, input, like);
  check_alike(op, "project_weight", project_weight, input, like);
  if (stem_weight.dim() != 4 || stem_weight.size(1) != channels) {
    fail(op, "stem_weight must have shape (S, ", channels, ", kH, kW) from input, got ",
         shape(stem_weight));
  }
  check_fills(op, "stem_weight", stem_weight);
  const int64_t hidden = stem_weight.size(0), out_channels = project_weight.size(0);
  const int64_t stem_h = stem_weight.size(2), stem_w = stem_weight.size(3);
  check_depthwise(op, depthwise_weight, hidden, "stem_weight");
  check_project(op, project_weight, hidden);
  check_bias(op, stem_bias, hidden, input, "stem_", like);
  check_bias(op, depthwise_bias, hidden, input, "depthwise_", like);
  check_bias(op, project_bias, out_channels, input, "project_", like);
  check_packed(op, packed, input, like);
  check_ints(op, "stem_stride", stem_stride, 2, 1);
  check_ints(op, "stem_padding", stem_padding, 4, 0);
  check_ints(op, "padding", padding, 4, 0);
  check_activation(op, act_min, act_max);
  int64_t padded_h = height + stem_padding[2] + stem_padding[3];
  int64_t padded_w = width + stem_padding[0] + stem_padding[1];
  check_kernel_fits(op, padded_h, padded_w, stem_h, stem_w, "stem kernel");
  const int64_t hidden_h = (padded_h - stem_h) / stem_stride[0] + 1;
  const int64_t hidden_w = (padded_w - stem_w) / stem_stride[1] + 1;
  const int64_t kernel_h = depthwise_weight.size(2), kernel_w = depthwise_weight.size(3);
  padded_h = hidden_h + padding[2] + padding[3];
  padded_w = hidden_w + padding[0] + padding[1];
  check_kernel_fits(op, padded_h, padded_w, kernel_h, kernel_w, "depthwise kernel", "stem output");
  const int64_t out_h = padded_h - kernel_h + 1, out_w = padded_w - kernel_w + 1;
  check_size(op, "stem output", hidden, hidden_h, hidden_w);
  check_size(op, "depthwise output", hidden, out_h, out_w);
  check_size(op, "output", out_channels, out_h, out_w);

  BlockParams p{};
  p.problem =
      block_problem(depthwise_weight, project_weight, {1, 1}, padding, clamp(act_min, act_max));
  p.problem.batch = batch;
  p.problem.e_h = int(hidden_h);
  p.problem.e_w = int(hidden_w);
  p.problem.source_channels = int(channels);
  p.problem.out_h = int(out_h);
  p.problem.out_w = int(out_w);
  p.problem.image = true;
  p.problem.stem_window_h = int(stem_h);
  p.problem.stem_window_w = int(stem_w);
  p.problem.stem_stride_h = int(stem_stride[0]);
  p.problem.stem_stride_w = int(stem_stride[1]);
  p.problem.stem_left = int(stem_padding[0]);
  p.problem.stem_top = int(stem_padding[2]);
  p.problem.image_span = image_span(input);
  p.height = int(height);
  p.width = int(width);
  p.in_channels = int(channels);
  p.image_dtype = dtype_of(input);
  p.stride_n = input.stride(0);
  p.stride_c = int(input.stride(1));
  p.stride_h = int(input.stride(2));
  p.stride_w = int(input.stride(3));
  if (const auto output = run_fused(op, context, p, packed, [&] { return input; })) return *output;

  const Ints ones = {1, 1};
  Value image = input;
  if (input.type != stem_weight.type) {
    image = context.copy(input, stem_weight.type, Layout::kChannelsLast);
  }
  const Value hidden_map = conv2d(context, image, stem_weight, stem_bias, stem_stride, stem_padding,
                                  ones, 1, act_min, act_max);
  if (image.handle != input.handle) context.release(image);
  const Value output = inverted_residual(
      context, hidden_map, std::nullopt, std::nullopt, depthwise_weight, depthwise_bias,
      project_weight, project_bias, std::nullopt, ones, padding, false, act_min, act_max);
  context.release(hidden_map);
  return output;
}

}  // namespace torch_mbv2::bind

TORCH_MBV2_OP(stem_block,
              "stem_block(Tensor input, Tensor stem_weight, Tensor? stem_bias, "
              "Tensor depthwise_weight, Tensor? depthwise_bias, Tensor project_weight, "
              "Tensor? project_bias, Tensor? packed, int[2] stem_stride, int[4] stem_padding, "
              "int[4] padding, float? act_min, float? act_max) -> Tensor")
