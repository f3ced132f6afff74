#include "bind/op.h"

namespace torch_mbv2::bind {
namespace {

int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t out = (size + 2 * padding - kernel + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  // With ceil_mode the last window must still start inside the input or its left padding.
  return ceil_mode && (out - 1) * stride >= size + padding ? out - 1 : out;
}

}  // namespace

Value avg_pool2d(Context& context, Value input, Ints kernel_size, Ints stride, Ints padding,
                 bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override) {
  const char* op = "avg_pool2d";
  check_image(op, input);
  check_ints(op, "kernel_size", kernel_size, 2, 1);
  check_ints(op, "stride", stride, 2, 1);
  check_ints(op, "padding", padding, 2, 0);
  if (2 * padding[0] > kernel_size[0] || 2 * padding[1] > kernel_size[1]) {
    fail(op, "padding must be at most half of kernel_size ", tuple(kernel_size), ", got ",
         tuple(padding));
  }
  if (divisor_override && *divisor_override == 0) fail(op, "divisor_override must not be 0");
  const int64_t channels = input.size(1), height = input.size(2), width = input.size(3);
  check_kernel_fits(op, height + 2 * padding[0], width + 2 * padding[1], kernel_size[0],
                    kernel_size[1]);
  const int64_t out_h = pooled_size(height, kernel_size[0], stride[0], padding[0], ceil_mode);
  const int64_t out_w = pooled_size(width, kernel_size[1], stride[1], padding[1], ceil_mode);
  check_size(op, "output", channels, out_h, out_w);

  const Value output =
      context.empty(input.type, {input.size(0), channels, out_h, out_w}, Layout::kChannelsLast);
  if (output.numel() == 0) return output;
  input = context.dense(input, Layout::kChannelsLast);
  PoolParams p{};
  p.input = input.data;
  p.output = output.data;
  p.batch = input.size(0);
  p.height = int(height);
  p.width = int(width);
  p.channels = int(channels);
  p.out_h = int(out_h);
  p.out_w = int(out_w);
  p.kernel_h = int(kernel_size[0]);
  p.kernel_w = int(kernel_size[1]);
  p.stride_h = int(stride[0]);
  p.stride_w = int(stride[1]);
  p.pad_h = int(padding[0]);
  p.pad_w = int(padding[1]);
  p.count_include_pad = count_include_pad;
  p.divisor_override = divisor_override.value_or(0);
  p.dtype = dtype_of(input);
  check_launch(op, torch_mbv2::avg_pool2d(p, context.queue()));
  return output;
}

}  // namespace torch_mbv2::bind

TORCH_MBV2_OP(avg_pool2d,
              "avg_pool2d(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, "
              "bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor")
