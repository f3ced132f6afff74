#include "bind/op.h"

namespace torch_mbv2::bind {

Value conv_pool(Context& context, Value input, Value weight, std::optional<Value> bias,
                Bound act_min, Bound act_max) {
  const char* op = "conv_pool";
  check_image(op, input);
  check_channels(op, input);
  check_pixels(op, input);
  check_alike(op, "weight", weight, input);
  if (!is_pointwise(weight, input.size(1))) {
    fail(op, "weight must have shape (Cout, ", input.size(1), ", 1, 1) from input, got ",
         shape(weight));
  }
  const int64_t out_channels = weight.size(0);
  check_bias(op, bias, out_channels, input);
  check_activation(op, act_min, act_max);
  check_size(op, "convolution output", out_channels, input.size(2), input.size(3));

  const Value output =
      context.empty(input.type, {input.size(0), out_channels}, Layout::kContiguous);
  if (output.numel() == 0) return output;
  input = context.dense(input, Layout::kChannelsLast);
  // Of a 1x1 window both layouts are the same.
  weight = context.dense(weight, Layout::kChannelsLast);
  bias = context.dense(bias);
  ConvPoolParams p{};
  p.input = input.data;
  p.weight = weight.data;
  p.bias = pointer(bias);
  p.output = output.data;
  p.batch = input.size(0);
  p.pixels = int(input.size(2) * input.size(3));
  p.k = int(input.size(1));
  p.n = int(out_channels);
  p.act = clamp(act_min, act_max);
  p.dtype = dtype_of(input);
  check_launch(op, torch_mbv2::conv_pool(p, context.queue()));
  return output;
}

}  // namespace torch_mbv2::bind

TORCH_MBV2_OP(conv_pool,
              "conv_pool(Tensor input, Tensor weight, Tensor? bias, float? act_min, "
              "float? act_max) -> Tensor")
