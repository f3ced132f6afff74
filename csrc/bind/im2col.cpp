#include "bind/op.h"

namespace torch_mbv2::bind {

Value im2col(Context& context, Value input, Ints kernel_size, Ints dilation, Ints padding,
             Ints stride) {
  const char* op = "im2col";
  check_image(op, input);
  check_ints(op, "kernel_size", kernel_size, 2, 1);
  check_ints(op, "dilation", dilation, 2, 1);
  check_ints(op, "padding", padding, 2, 0);
  check_ints(op, "stride", stride, 2, 1);
  const int64_t channels = input.size(1), height = input.size(2), width = input.size(3);
  const int64_t dilated_h = dilation[0] * (kernel_size[0] - 1) + 1;
  const int64_t dilated_w = dilation[1] * (kernel_size[1] - 1) + 1;
  const int64_t padded_h = height + 2 * padding[0], padded_w = width + 2 * padding[1];
  check_kernel_fits(op, padded_h, padded_w, dilated_h, dilated_w);
  const int64_t out_h = (padded_h - dilated_h) / stride[0] + 1;
  const int64_t out_w = (padded_w - dilated_w) / stride[1] + 1;
  const int64_t rows = channels * kernel_size[0] * kernel_size[1];
  check_size(op, "output", rows, out_h, out_w);

  const Value output =
      context.empty(input.type, {input.size(0), rows, out_h * out_w}, Layout::kContiguous);
  if (output.numel() == 0) return output;
  Im2colParams p{};
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
  p.dilation_h = int(dilation[0]);
  p.dilation_w = int(dilation[1]);
  p.in_stride_n = input.stride(0);
  p.in_stride_c = input.stride(1);
  p.in_stride_h = input.stride(2);
  p.in_stride_w = input.stride(3);
  p.element_size = element_size(input.type);
  check_launch(op, torch_mbv2::im2col(p, context.queue()));
  return output;
}

}  // namespace torch_mbv2::bind

TORCH_MBV2_OP(im2col,
              "im2col(Tensor input, int[2] kernel_size, int[2] dilation, int[2] padding, "
              "int[2] stride) -> Tensor")
