// conv2d and conv2d_winograd.
#include "bind/conv2d.h"

#include "bind/op.h"
#include "plan/convolution.h"

namespace torch_mbv2::bind {
namespace {

void set_input(ConvParams& p, const Value& input) {
  p.input = input.data;
  p.in_stride_n = input.stride(0);
  p.in_stride_c = int(input.stride(1));
  p.in_stride_h = int(input.stride(2));
  p.in_stride_w = int(input.stride(3));
}

void set_dense_input(ConvParams& p, const Value& input) {
  p.input = input.data;
  p.in_stride_c = 1;
  p.in_stride_w = p.in_channels;
  p.in_stride_h = p.in_stride_w * p.width;
  p.in_stride_n = int64_t(p.in_stride_h) * p.height;
}

Value make_output(Context& context, const ConvParams& p, const Value& input) {
  return context.empty(input.type, {p.batch, p.out_channels, p.out_h, p.out_w},
                       Layout::kChannelsLast);
}

cudaError_t run_gemm(const ConvParams& p, LaunchQueue& queue) {
  return gemm({p.input, p.weight, p.bias, p.output, p.batch * p.height * p.width, p.out_channels,
               p.in_channels, 1, p.act, p.dtype},
              queue);
}

// Checks all arguments of a convolution; its parameters, without pointers and strides.
ConvParams conv_params(const char* op, const Value& input, const Value& weight,
                       const std::optional<Value>& bias, const Ints& stride, const Ints& padding,
                       const Ints& dilation, int64_t groups, Bound act_min, Bound act_max) {
  check_image(op, input);
  check_alike(op, "weight", weight, input);
  check_ints(op, "stride", stride, 2, 1);
  check_ints(op, "padding", padding, 4, 0);
  check_ints(op, "dilation", dilation, 2, 1);
  check_channels(op, input);
  if (weight.dim() != 4) {
    fail(op, "weight must have shape (Cout, Cin / groups, kH, kW), got ", shape(weight));
  }
  const int64_t channels = input.size(1), out_channels = weight.size(0);
  if (groups < 1 || channels % groups != 0 || out_channels % groups != 0) {
    fail(op, "groups must divide Cin ", channels, " and Cout ", out_channels, ", got ", groups);
  }
  if (weight.size(1) != channels / groups) {
    fail(op, "weight must have shape (Cout, ", channels / groups, ", kH, kW) from ", channels,
         " input channels in ", groups, " groups, got ", shape(weight));
  }
  check_bias(op, bias, out_channels, input);
  check_activation(op, act_min, act_max);
  const int64_t dilated_h = dilation[0] * (weight.size(2) - 1) + 1;
  const int64_t dilated_w = dilation[1] * (weight.size(3) - 1) + 1;
  const int64_t padded_h = input.size(2) + padding[2] + padding[3];
  const int64_t padded_w = input.size(3) + padding[0] + padding[1];
  check_kernel_fits(op, padded_h, padded_w, dilated_h, dilated_w);
  const int64_t out_h = (padded_h - dilated_h) / stride[0] + 1;
  const int64_t out_w = (padded_w - dilated_w) / stride[1] + 1;
  check_size(op, "output", out_channels, out_h, out_w);

  ConvParams p{};
  p.batch = input.size(0);
  p.height = int(input.size(2));
  p.width = int(input.size(3));
  p.in_channels = int(channels);
  p.out_h = int(out_h);
  p.out_w = int(out_w);
  p.out_channels = int(out_channels);
  p.kernel_h = int(weight.size(2));
  p.kernel_w = int(weight.size(3));
  p.stride_h = int(stride[0]);
  p.stride_w = int(stride[1]);
  p.pad_left = int(padding[0]);
  p.pad_top = int(padding[2]);
  p.dilation_h = int(dilation[0]);
  p.dilation_w = int(dilation[1]);
  p.groups = int(groups);
  p.act = clamp(act_min, act_max);
  p.dtype = dtype_of(input);
  return p;
}

// Runs what `p` and `weight`, `bias` say on the kernel for dense 3x3 convolutions of stride 1.
Value run_winograd(const char* op, Context& context, ConvParams p, const Value& input,
                   const Value& weight, const std::optional<Value>& bias) {
  const Value output = make_output(context, p, input);
  if (output.numel() == 0) return output;
  const auto dense_bias = context.dense(bias);
  p.bias = pointer(dense_bias);
  p.output = output.data;
  const Value dense_weight = context.dense(weight, Layout::kChannelsLast);
  p.weight = dense_weight.data;
  const Value dense_input = context.dense(input, Layout::kChannelsLast);
  set_dense_input(p, dense_input);
  const Value workspace = context.workspace(conv_winograd_workspace(p));
  check_launch(op, conv_winograd(p, workspace.data, context.queue()));
  return output;
}

}  // namespace

int64_t image_span(const Value& x) {
  int64_t last = 0;
  for (const int dim : {1, 2, 3}) last += (x.size(dim) - 1) * x.stride(dim);
  return last;
}

Value conv2d(Context& context, Value input, Value weight, std::optional<Value> bias, Ints stride,
             Ints padding, Ints dilation, int64_t groups, Bound act_min, Bound act_max) {
  const char* op = "conv2d";
  ConvParams p =
      conv_params(op, input, weight, bias, stride, padding, dilation, groups, act_min, act_max);
  const plan::ConvolutionProblem problem = {.in_channels = p.in_channels,
                                            .out_channels = p.out_channels,
                                            .groups = p.groups,
                                            .kernel_h = p.kernel_h,
                                            .kernel_w = p.kernel_w,
                                            .stride_h = p.stride_h,
                                            .stride_w = p.stride_w,
                                            .dilation_h = p.dilation_h,
                                            .dilation_w = p.dilation_w,
                                            .padded = padding != Ints{0, 0, 0, 0},
                                            .dtype = p.dtype};
  const plan::ConvolutionKernel kernel = plan::plan_convolution(problem);
  if (kernel == plan::ConvolutionKernel::kWinograd) {
    return run_winograd(op, context, p, input, weight, bias);
  }
  const Value output = make_output(context, p, input);
  if (output.numel() == 0) return output;
  bias = context.dense(bias);
  p.bias = pointer(bias);
  p.output = output.data;
  weight = context.dense(weight, Layout::kChannelsLast);
  p.weight = weight.data;
  if (plan::reads_in_place(problem, kernel, image_span(input), input.stride(1) == 1)) {
    set_input(p, input);
  } else {
    input = context.dense(input, Layout::kChannelsLast);
    set_dense_input(p, input);
  }
  LaunchQueue& queue = context.queue();
  check_launch(op, kernel == plan::ConvolutionKernel::kDepthwise ? conv_depthwise(p, queue)
                   : kernel == plan::ConvolutionKernel::kGemm    ? run_gemm(p, queue)
                                                                 : conv_implicit_gemm(p, queue));
  return output;
}

Value conv2d_winograd(Context& context, Value input, Value weight, std::optional<Value> bias,
                      Ints padding, Bound act_min, Bound act_max) {
  const char* op = "conv2d_winograd";
  const ConvParams p =
      conv_params(op, input, weight, bias, {1, 1}, padding, {1, 1}, 1, act_min, act_max);
  if (p.kernel_h != 3 || p.kernel_w != 3) {
    fail(op, "weight must have a 3 x 3 kernel, got ", shape(weight));
  }
  return run_winograd(op, context, p, input, weight, bias);
}

}  // namespace torch_mbv2::bind

TORCH_MBV2_OP(conv2d,
              "conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, "
              "int[2] dilation, int groups, float? act_min, float? act_max) -> Tensor")
TORCH_MBV2_OP(conv2d_winograd,
              "conv2d_winograd(Tensor input, Tensor weight, Tensor? bias, int[4] padding, "
              "float? act_min, float? act_max) -> Tensor")
