#include "bind/op.h"

namespace torch_mbv2::bind {

Value add(Context& context, Value input, Value other, Bound act_min, Bound act_max) {
  const char* op = "add";
  check_float(op, input);
  check_alike(op, "other", other, input);
  if (input.sizes != other.sizes) {
    fail(op, "other must have the shape of input, ", shape(input), ", got ", shape(other));
  }
  check_activation(op, act_min, act_max);
  const Layout layout = input.dim() == 4 ? Layout::kChannelsLast : Layout::kContiguous;
  const Value output = context.empty(input.type, input.sizes, layout);
  if (output.numel() == 0) return output;
  input = context.dense(input, layout);
  other = context.dense(other, layout);
  const AddParams p = {
      input.data,     other.data, output.data, output.numel(), clamp(act_min, act_max),
      dtype_of(input)};
  check_launch(op, torch_mbv2::add(p, context.queue()));
  return output;
}

}  // namespace torch_mbv2::bind

TORCH_MBV2_OP(add, "add(Tensor input, Tensor other, float? act_min, float? act_max) -> Tensor")
