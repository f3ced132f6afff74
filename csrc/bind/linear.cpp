#include "bind/op.h"

namespace torch_mbv2::bind {

Value linear(Context& context, Value input, Value weight, std::optional<Value> bias, Bound act_min,
             Bound act_max) {
  const char* op = "linear";
  check_float(op, input);
  check_alike(op, "weight", weight, input);
  if (input.dim() < 1) fail(op, "input must have shape (..., K), got ", shape(input));
  const int64_t features = input.sizes.back();
  if (weight.dim() != 2 || weight.size(1) != features) {
    fail(op, "weight must have shape (N, ", features, ") from input, got ", shape(weight));
  }
  check_bias(op, bias, weight.size(0), input);
  check_activation(op, act_min, act_max);
  if (weight.size(0) > INT32_MAX || features > INT32_MAX) {
    fail(op, "weight must have fewer than 2147483648 rows and columns, got ", shape(weight));
  }

  Ints size = input.sizes;
  size.back() = weight.size(0);
  const Value output = context.empty(input.type, size, Layout::kContiguous);
  if (output.numel() == 0) return output;
  input = context.dense(input, Layout::kContiguous);
  weight = context.dense(weight, Layout::kContiguous);
  bias = context.dense(bias);
  const int64_t rows = output.numel() / weight.size(0);
  check_launch(op,
               gemm({input.data, weight.data, pointer(bias), output.data, rows, int(weight.size(0)),
                     int(features), 1, clamp(act_min, act_max), dtype_of(input)},
                    context.queue()));
  return output;
}

}  // namespace torch_mbv2::bind

TORCH_MBV2_OP(linear,
              "linear(Tensor input, Tensor weight, Tensor? bias, float? act_min, float? act_max) "
              "-> Tensor")
