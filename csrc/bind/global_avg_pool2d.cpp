#include "bind/op.h"

namespace torch_mbv2::bind {

Value global_avg_pool2d(Context& context, Value input, bool keepdim) {
  const char* op = "global_avg_pool2d";
  check_image(op, input);
  check_pixels(op, input);
  const int64_t batch = input.size(0), channels = input.size(1);
  const Value output =
      keepdim ? context.empty(input.type, {batch, channels, 1, 1}, Layout::kChannelsLast)
              : context.empty(input.type, {batch, channels}, Layout::kContiguous);
  if (output.numel() == 0) return output;
  input = context.dense(input, Layout::kChannelsLast);
  const GlobalPoolParams p = {input.data,    output.data,    batch, input.size(2) * input.size(3),
                              int(channels), dtype_of(input)};
  check_launch(op, torch_mbv2::global_avg_pool2d(p, context.queue()));
  return output;
}

}  // namespace torch_mbv2::bind

TORCH_MBV2_OP(global_avg_pool2d, "global_avg_pool2d(Tensor input, bool keepdim) -> Tensor")
