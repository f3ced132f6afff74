// The only file that includes torch (LibTorch stable ABI): argument checks, memory, stream, choice
// of kernel, registration for CUDA. Schemas, fakes and the stock implementations are in ops.py;
// every check here stands there too, in the same order and the same words.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cctype>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

// Nested, so that an op here may have the name of its launcher in kernels.h.
namespace torch_mbv2::bindings {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Bound = std::optional<double>;

// ------------------------------------------------------------------------------------- messages

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "torch_mbv2::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// As Python prints a tuple.
template <typename List>
std::string tuple(const List& values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(values[i]);
  }
  return text + (values.size() == 1 ? ",)" : ")");
}

std::string shape(const Tensor& x) { return tuple(x.sizes()); }

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

// As Python names it, without "torch.".
std::string name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default: {  // C++ and Python call the others alike, but for the case: BFloat16, Float8_e5m2
      std::string text = torch::headeronly::toString(type);
      for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
      return text;
    }
  }
}

std::string device(const Tensor& x) {
  if (x.is_cuda()) return "cuda:" + std::to_string(x.get_device_index());
  return x.is_cpu() ? "cpu" : "another device";
}

// --------------------------------------------------------------------------------------- checks

bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

void check_float(const char* op, const Tensor& x, const char* what = "input") {
  const ScalarType type = x.scalar_type();
  if (!is_supported(type)) {
    fail(op, what, " must be float32, float16 or bfloat16, got ", name(type));
  }
}

void check_size(const char* op, const char* what, int64_t channels, int64_t height, int64_t width) {
  // Kernels address one image with 32-bit offsets; only the batch makes them 64-bit.
  if (__int128(channels) * height * width > std::numeric_limits<int32_t>::max()) {
    fail(op, "one image of ", what, " must have fewer than 2147483648 elements, got ",
         tuple(Ints{channels, height, width}));
  }
}

void check_image(const char* op, const Tensor& input) {
  check_float(op, input);
  if (input.dim() != 4) fail(op, "input must have shape (N, C, H, W), got ", shape(input));
  check_size(op, "input", input.size(1), input.size(2), input.size(3));
}

// The tensor whose dtype others must have.
struct Like {
  const char* what;
  const Tensor& tensor;
};

void check_alike(const char* op, const std::string& what, const Tensor& x, const Tensor& input,
                 const Like& like) {
  if (x.scalar_type() != like.tensor.scalar_type()) {
    fail(op, what, " must have the dtype of ", like.what, ", ", name(like.tensor.scalar_type()),
         ", got ", name(x.scalar_type()));
  }
  if (device(x) != device(input)) {
    fail(op, what, " must be on the device of input, ", device(input), ", got ", device(x));
  }
}

void check_alike(const char* op, const std::string& what, const Tensor& x, const Tensor& input) {
  check_alike(op, what, x, input, {"input", input});
}

// `part` is what comes before "bias" and "weight" in the arguments' names.
void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t channels,
                const Tensor& input, const std::string& part, const Like& like) {
  if (!bias) return;
  check_alike(op, part + "bias", *bias, input, like);
  if (bias->dim() != 1 || bias->size(0) != channels) {
    fail(op, part, "bias must have shape (", channels, ",) from ", part, "weight, got ",
         shape(*bias));
  }
}

void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t channels,
                const Tensor& input) {
  check_bias(op, bias, channels, input, "", {"input", input});
}

void check_channels(const char* op, const Tensor& input) {
  if (input.size(1) < 1) fail(op, "input must have at least one channel, got ", shape(input));
}

void check_pixels(const char* op, const Tensor& input) {
  if (input.size(2) < 1 || input.size(3) < 1) {
    fail(op, "input must have at least one pixel, got ", shape(input));
  }
}

void check_ints(const char* op, const char* what, const Ints& values, size_t count, int64_t least) {
  if (values.size() != count) fail(op, what, " must have ", count, " values, got ", values.size());
  for (const int64_t value : values) {
    if (value < least) fail(op, what, " must be at least ", least, ", got ", tuple(values));
  }
  for (const int64_t value : values) {
    if (value > std::numeric_limits<int32_t>::max()) {
      fail(op, what, " must be less than 2147483648, got ", tuple(values));
    }
  }
}

void check_activation(const char* op, Bound act_min, Bound act_max) {
  if (act_min && act_max && !(*act_min <= *act_max)) {
    fail(op, "act_min must not exceed act_max, got ", number(*act_min), " and ", number(*act_max));
  }
}

void check_kernel_fits(const char* op, int64_t height, int64_t width, int64_t kernel_h,
                       int64_t kernel_w, const char* kernel = "kernel",
                       const char* image = "input") {
  if (kernel_h < 1 || kernel_w < 1 || height < kernel_h || width < kernel_w) {
    fail(op, "the ", kernel, " must fit into the padded ", image, ": dilated kernel ",
         tuple(Ints{kernel_h, kernel_w}), ", padded ", image, " ", tuple(Ints{height, width}));
  }
}

// ------------------------------------------------------------------------------ memory and launch

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

Clamp clamp(Bound act_min, Bound act_max) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  return {act_min ? float(*act_min) : -kInfinity, act_max ? float(*act_max) : kInfinity};
}

Tensor empty(const Tensor& like, const Ints& size, MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              format);
}

// Whether the elements of a 4-D tensor lie in the order (n, h, w, c) without gaps. The strides of
// dimensions of size 1 do not matter.
bool is_dense_nhwc(const Tensor& x) {
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

Tensor dense_nhwc(const Tensor& x) {
  if (x.numel() == 0 || is_dense_nhwc(x)) return x;
  Tensor copy = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(),
                                     std::nullopt, MemoryFormat::ChannelsLast);
  torch::stable::copy_(copy, x);
  return copy;
}

Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

const void* pointer(const std::optional<Tensor>& x) { return x ? x->data_ptr() : nullptr; }

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next check of somebody else would report it again
  fail(op, "CUDA error: ", cudaGetErrorString(error));
}

// --------------------------------------------------------------------------------- convolutions

ConvParams conv_params(const char* op, const Tensor& input, const Tensor& weight,
                       const std::optional<Tensor>& bias, const Ints& stride, const Ints& padding,
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

void set_input(ConvParams& p, const Tensor& input) {
  p.input = input.data_ptr();
  p.in_stride_n = input.stride(0);
  p.in_stride_c = int(input.stride(1));
  p.in_stride_h = int(input.stride(2));
  p.in_stride_w = int(input.stride(3));
}

// Whether offsets within one image of a (N, C, H, W) tensor of any strides are below 2^31.
bool has_small_images(const Tensor& x) {
  int64_t last = 0;
  for (const int dim : {1, 2, 3}) last += (x.size(dim) - 1) * x.stride(dim);
  return last < std::numeric_limits<int32_t>::max();
}

void set_dense_input(ConvParams& p, const Tensor& input) {
  p.input = input.data_ptr();
  p.in_stride_c = 1;
  p.in_stride_w = p.in_channels;
  p.in_stride_h = p.in_stride_w * p.width;
  p.in_stride_n = p.in_stride_h * p.height;
}

enum class Route { kGemm, kDepthwise, kWinograd, kImplicitGemm };

// Which kernel a convolution runs on. `padded` tells whether any side has padding.
Route choose_route(const ConvParams& p, bool padded) {
  if (p.groups > 1) {
    const bool depthwise = p.groups == p.in_channels && p.groups == p.out_channels;
    return depthwise ? Route::kDepthwise : Route::kImplicitGemm;
  }
  const bool dense = p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1;
  if (p.kernel_h == 1 && p.kernel_w == 1) {
    const bool pointwise = p.stride_h == 1 && p.stride_w == 1 && !padded;
    return pointwise ? Route::kGemm : Route::kImplicitGemm;
  }
  // Winograd's transforms pay off with many channels, and in float32 only, where there are no
  // tensor cores to beat.
  const bool winograd = p.kernel_h == 3 && p.kernel_w == 3 && dense && p.in_channels >= 64 &&
                        p.out_channels >= 64 && p.dtype == DType::kFloat32;
  return winograd ? Route::kWinograd : Route::kImplicitGemm;
}

cudaError_t run_winograd(const ConvParams& p, const Tensor& input, cudaStream_t stream) {
  Tensor workspace = torch::stable::empty({conv_winograd_workspace(p)}, ScalarType::Byte,
                                          std::nullopt, input.device());
  return conv_winograd(p, workspace.data_ptr(), stream);
}

Tensor conv2d(Tensor input, Tensor weight, std::optional<Tensor> bias, Ints stride, Ints padding,
              Ints dilation, int64_t groups, Bound act_min, Bound act_max) {
  const char* op = "conv2d";
  ConvParams p =
      conv_params(op, input, weight, bias, stride, padding, dilation, groups, act_min, act_max);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor output =
      empty(input, {p.batch, p.out_channels, p.out_h, p.out_w}, MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  const cudaStream_t stream = current_stream(input);
  if (bias) bias = dense(*bias);
  p.bias = pointer(bias);
  p.output = output.data_ptr();
  weight = dense_nhwc(weight);
  p.weight = weight.data_ptr();

  const Route route = choose_route(p, padding != Ints{0, 0, 0, 0});
  // A few input channels are gathered one by one in any case, so they need no copy.
  if (route == Route::kImplicitGemm && has_small_images(input) &&
      (p.in_channels / p.groups < 8 || input.stride(1) == 1)) {
    set_input(p, input);
  } else {
    input = dense_nhwc(input);
    set_dense_input(p, input);
  }
  switch (route) {
    case Route::kDepthwise:
      check_launch(op, conv_depthwise(p, stream));
      break;
    case Route::kWinograd:
      check_launch(op, run_winograd(p, input, stream));
      break;
    case Route::kImplicitGemm:
      check_launch(op, conv_implicit_gemm(p, stream));
      break;
    case Route::kGemm: {
      const int64_t pixels = p.batch * p.height * p.width;
      check_launch(op, gemm({p.input, p.weight, p.bias, p.output, pixels, p.out_channels,
                             p.in_channels, 1, p.act, p.dtype},
                            stream));
      break;
    }
  }
  return output;
}

Tensor conv2d_winograd(Tensor input, Tensor weight, std::optional<Tensor> bias, Ints padding,
                       Bound act_min, Bound act_max) {
  const char* op = "conv2d_winograd";
  ConvParams p = conv_params(op, input, weight, bias, {1, 1}, padding, {1, 1}, 1, act_min, act_max);
  if (p.kernel_h != 3 || p.kernel_w != 3) {
    fail(op, "weight must have a 3 x 3 kernel, got ", shape(weight));
  }
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor output =
      empty(input, {p.batch, p.out_channels, p.out_h, p.out_w}, MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  const cudaStream_t stream = current_stream(input);
  if (bias) bias = dense(*bias);
  p.bias = pointer(bias);
  p.output = output.data_ptr();
  weight = dense_nhwc(weight);
  p.weight = weight.data_ptr();
  input = dense_nhwc(input);
  set_dense_input(p, input);
  check_launch(op, run_winograd(p, input, stream));
  return output;
}

// --------------------------------------------------------------------------------------- linear

Tensor linear(Tensor input, Tensor weight, std::optional<Tensor> bias, Bound act_min,
              Bound act_max) {
  const char* op = "linear";
  check_float(op, input);
  check_alike(op, "weight", weight, input);
  if (input.dim() < 1) fail(op, "input must have shape (..., K), got ", shape(input));
  const int64_t features = input.size(input.dim() - 1);
  if (weight.dim() != 2 || weight.size(1) != features) {
    fail(op, "weight must have shape (N, ", features, ") from input, got ", shape(weight));
  }
  check_bias(op, bias, weight.size(0), input);
  check_activation(op, act_min, act_max);
  if (weight.size(0) > INT32_MAX || features > INT32_MAX) {
    fail(op, "weight must have fewer than 2147483648 rows and columns, got ", shape(weight));
  }

  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const auto sizes = input.sizes();
  Ints size(sizes.begin(), sizes.end());
  size.back() = weight.size(0);
  Tensor output = empty(input, size);
  if (output.numel() == 0) return output;
  const cudaStream_t stream = current_stream(input);
  input = dense(input);
  weight = dense(weight);
  if (bias) bias = dense(*bias);
  const int64_t rows = output.numel() / weight.size(0);
  check_launch(
      op, gemm({input.data_ptr(), weight.data_ptr(), pointer(bias), output.data_ptr(), rows,
                int(weight.size(0)), int(features), 1, clamp(act_min, act_max), dtype_of(input)},
               stream));
  return output;
}

// -------------------------------------------------------------------------------------- pooling

int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t out = (size + 2 * padding - kernel + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  // With ceil_mode the last window must still start inside the input or its left padding.
  return ceil_mode && (out - 1) * stride >= size + padding ? out - 1 : out;
}

Tensor avg_pool2d(Tensor input, Ints kernel_size, Ints stride, Ints padding, bool ceil_mode,
                  bool count_include_pad, std::optional<int64_t> divisor_override) {
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

  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor output = empty(input, {input.size(0), channels, out_h, out_w}, MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  const cudaStream_t stream = current_stream(input);
  input = dense_nhwc(input);
  PoolParams p{};
  p.input = input.data_ptr();
  p.output = output.data_ptr();
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
  check_launch(op, torch_mbv2::avg_pool2d(p, stream));
  return output;
}

Tensor global_avg_pool2d(Tensor input, bool keepdim) {
  const char* op = "global_avg_pool2d";
  check_image(op, input);
  check_pixels(op, input);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const int64_t batch = input.size(0), channels = input.size(1);
  Tensor output = keepdim ? empty(input, {batch, channels, 1, 1}, MemoryFormat::ChannelsLast)
                          : empty(input, {batch, channels});
  if (output.numel() == 0) return output;
  const cudaStream_t stream = current_stream(input);
  input = dense_nhwc(input);
  const GlobalPoolParams p = {
      input.data_ptr(), output.data_ptr(), batch, input.size(2) * input.size(3),
      int(channels),    dtype_of(input)};
  check_launch(op, torch_mbv2::global_avg_pool2d(p, stream));
  return output;
}

// ------------------------------------------------------------------------------------------ add

Tensor add(Tensor input, Tensor other, Bound act_min, Bound act_max) {
  const char* op = "add";
  check_float(op, input);
  check_alike(op, "other", other, input);
  if (shape(input) != shape(other)) {
    fail(op, "other must have the shape of input, ", shape(input), ", got ", shape(other));
  }
  check_activation(op, act_min, act_max);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const bool image = input.dim() == 4;
  const auto sizes = input.sizes();
  Tensor output = empty(input, Ints(sizes.begin(), sizes.end()),
                        image ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (output.numel() == 0) return output;
  const cudaStream_t stream = current_stream(input);
  input = image ? dense_nhwc(input) : dense(input);
  other = image ? dense_nhwc(other) : dense(other);
  const AddParams p = {input.data_ptr(), other.data_ptr(),        output.data_ptr(),
                       output.numel(),   clamp(act_min, act_max), dtype_of(input)};
  check_launch(op, torch_mbv2::add(p, stream));
  return output;
}

// --------------------------------------------------------------------------------------- blocks

void check_fills(const char* op, const char* what, const Tensor& weight) {
  if (weight.size(0) < 1) {
    fail(op, what, " must have at least one output channel, got ", shape(weight));
  }
}

void check_depthwise(const char* op, const Tensor& weight, int64_t channels, const char* source) {
  if (weight.dim() != 4 || weight.size(0) != channels || weight.size(1) != 1) {
    fail(op, "depthwise_weight must have shape (", channels, ", 1, kH, kW) from ", source, ", got ",
         shape(weight));
  }
}

bool is_pointwise(const Tensor& weight, int64_t channels) {
  return weight.dim() == 4 && weight.size(1) == channels && weight.size(2) == 1 &&
         weight.size(3) == 1;
}

void check_project(const char* op, const Tensor& weight, int64_t channels) {
  if (!is_pointwise(weight, channels)) {
    fail(op, "project_weight must have shape (Cout, ", channels,
         ", 1, 1) from depthwise_weight, got ", shape(weight));
  }
}

void check_packed(const char* op, const std::optional<Tensor>& packed, const Tensor& input,
                  const Like& like) {
  if (!packed) return;
  check_alike(op, "packed", *packed, input, like);
  if (packed->dim() != 1) fail(op, "packed must have shape (L,), got ", shape(*packed));
}

// Whether the fused kernel takes a block with these packed weights.
bool is_fused(const char* op, const InvertedResidualParams& p,
              const std::optional<Tensor>& packed) {
  if (!packed || p.act.lo != 0) return false;
  const int64_t bytes = inverted_residual_packed_bytes(p);
  if (bytes < 0) return false;
  if (packed->numel() * 2 != bytes) {
    fail(op, "packed must have shape (", bytes / 2,
         ",) for these weights, as torch_mbv2.packing "
         "makes it, got ",
         shape(*packed));
  }
  const bool aligned = reinterpret_cast<uintptr_t>(packed->data_ptr()) % 16 == 0;
  return packed->is_contiguous() && aligned && inverted_residual_fits(p);
}

// What the fused kernel takes for granted of the depthwise convolution.
bool has_fused_window(const Tensor& depthwise_weight, const Ints& padding) {
  return depthwise_weight.size(2) == 3 && depthwise_weight.size(3) == 3 && padding[0] <= 64 &&
         padding[2] <= 64;
}

Tensor inverted_residual(Tensor input, std::optional<Tensor> expand_weight,
                         std::optional<Tensor> expand_bias, Tensor depthwise_weight,
                         std::optional<Tensor> depthwise_bias, Tensor project_weight,
                         std::optional<Tensor> project_bias, std::optional<Tensor> packed,
                         Ints stride, Ints padding, bool residual, Bound act_min, Bound act_max) {
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

  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  if (has_fused_window(depthwise_weight, padding) && stride[0] == stride[1]) {
    InvertedResidualParams p{};
    p.batch = batch;
    p.height = p.expanded_h = int(height);
    p.width = p.expanded_w = int(width);
    p.in_channels = int(channels);
    p.expanded = int(expanded);
    p.out_h = int(out_h);
    p.out_w = int(out_w);
    p.out_channels = int(out_channels);
    p.stride = int(stride[0]);
    p.pad_left = int(padding[0]);
    p.pad_top = int(padding[2]);
    p.expands = expand_weight.has_value();
    p.residual = residual;
    p.act = clamp(act_min, act_max);
    p.dtype = dtype_of(input);
    if (is_fused(op, p, packed)) {
      Tensor output = empty(input, {batch, out_channels, out_h, out_w}, MemoryFormat::ChannelsLast);
      if (output.numel() == 0) return output;
      input = dense_nhwc(input);
      const bool aligned = reinterpret_cast<uintptr_t>(input.data_ptr()) % 16 == 0;
      if (!aligned) input = torch::stable::clone(input);
      p.input = input.data_ptr();
      p.packed = packed->data_ptr();
      p.output = output.data_ptr();
      check_launch(op, torch_mbv2::inverted_residual(p, current_stream(input)));
      return output;
    }
  }
  const Ints ones = {1, 1}, none = {0, 0, 0, 0};
  Tensor y = input;
  if (expand_weight) {
    y = conv2d(y, *expand_weight, expand_bias, ones, none, ones, 1, act_min, act_max);
  }
  y = conv2d(y, depthwise_weight, depthwise_bias, stride, padding, ones, expanded, act_min,
             act_max);
  y = conv2d(y, project_weight, project_bias, ones, none, ones, 1, std::nullopt, std::nullopt);
  return residual ? add(input, y, std::nullopt, std::nullopt) : y;
}

Tensor stem_block(Tensor input, Tensor stem_weight, std::optional<Tensor> stem_bias,
                  Tensor depthwise_weight, std::optional<Tensor> depthwise_bias,
                  Tensor project_weight, std::optional<Tensor> project_bias,
                  std::optional<Tensor> packed, Ints stem_stride, Ints stem_padding, Ints padding,
                  Bound act_min, Bound act_max) {
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

  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Ints twos = {2, 2}, ones = {1, 1}, none = {0, 0, 0, 0};
  if (has_fused_window(depthwise_weight, padding) && stem_h == 3 && stem_w == 3 &&
      stem_stride == twos && channels <= 3 && stem_padding[0] <= 64 && stem_padding[2] <= 64 &&
      has_small_images(input)) {
    InvertedResidualParams p{};
    p.batch = batch;
    p.height = int(height);
    p.width = int(width);
    p.in_channels = int(channels);
    p.expanded = int(hidden);
    p.expanded_h = int(hidden_h);
    p.expanded_w = int(hidden_w);
    p.out_h = int(out_h);
    p.out_w = int(out_w);
    p.out_channels = int(out_channels);
    p.stride = 1;
    p.pad_left = int(padding[0]);
    p.pad_top = int(padding[2]);
    p.expands = p.stem = true;
    p.stem_left = int(stem_padding[0]);
    p.stem_top = int(stem_padding[2]);
    p.stride_n = input.stride(0);
    p.stride_c = int(input.stride(1));
    p.stride_h = int(input.stride(2));
    p.stride_w = int(input.stride(3));
    p.image_dtype = dtype_of(input);
    p.act = clamp(act_min, act_max);
    p.dtype = dtype_of(stem_weight);
    if (is_fused(op, p, packed)) {
      Tensor output =
          empty(stem_weight, {batch, out_channels, out_h, out_w}, MemoryFormat::ChannelsLast);
      if (output.numel() == 0) return output;
      p.input = input.data_ptr();
      p.packed = packed->data_ptr();
      p.output = output.data_ptr();
      check_launch(op, torch_mbv2::inverted_residual(p, current_stream(input)));
      return output;
    }
  }
  Tensor y = input;
  if (input.scalar_type() != stem_weight.scalar_type()) {
    y = torch::stable::empty(input.sizes(), stem_weight.scalar_type(), std::nullopt, input.device(),
                             std::nullopt, MemoryFormat::ChannelsLast);
    torch::stable::copy_(y, input);
  }
  y = conv2d(y, stem_weight, stem_bias, stem_stride, stem_padding, ones, 1, act_min, act_max);
  y = conv2d(y, depthwise_weight, depthwise_bias, ones, padding, ones, hidden, act_min, act_max);
  return conv2d(y, project_weight, project_bias, ones, none, ones, 1, std::nullopt, std::nullopt);
}

Tensor conv_pool(Tensor input, Tensor weight, std::optional<Tensor> bias, Bound act_min,
                 Bound act_max) {
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

  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor output = empty(input, {input.size(0), out_channels});
  if (output.numel() == 0) return output;
  const cudaStream_t stream = current_stream(input);
  input = dense_nhwc(input);
  weight = dense(weight);
  if (bias) bias = dense(*bias);
  ConvPoolParams p{};
  p.input = input.data_ptr();
  p.weight = weight.data_ptr();
  p.bias = pointer(bias);
  p.output = output.data_ptr();
  p.batch = input.size(0);
  p.pixels = int(input.size(2) * input.size(3));
  p.k = int(input.size(1));
  p.n = int(out_channels);
  p.act = clamp(act_min, act_max);
  p.dtype = dtype_of(input);
  check_launch(op, torch_mbv2::conv_pool(p, stream));
  return output;
}

// --------------------------------------------------------------------------------------- im2col

Tensor im2col(Tensor input, Ints kernel_size, Ints dilation, Ints padding, Ints stride) {
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

  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor output = empty(input, {input.size(0), rows, out_h * out_w});
  if (output.numel() == 0) return output;
  Im2colParams p{};
  p.input = input.data_ptr();
  p.output = output.data_ptr();
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
  p.element_size = dtype_of(input) == DType::kFloat32 ? 4 : 2;
  check_launch(op, torch_mbv2::im2col(p, current_stream(input)));
  return output;
}

}  // namespace
}  // namespace torch_mbv2::bindings

STABLE_TORCH_LIBRARY_IMPL(torch_mbv2, CUDA, m) {
  m.impl("conv2d", TORCH_BOX(&torch_mbv2::bindings::conv2d));
  m.impl("conv2d_winograd", TORCH_BOX(&torch_mbv2::bindings::conv2d_winograd));
  m.impl("linear", TORCH_BOX(&torch_mbv2::bindings::linear));
  m.impl("avg_pool2d", TORCH_BOX(&torch_mbv2::bindings::avg_pool2d));
  m.impl("global_avg_pool2d", TORCH_BOX(&torch_mbv2::bindings::global_avg_pool2d));
  m.impl("add", TORCH_BOX(&torch_mbv2::bindings::add));
  m.impl("inverted_residual", TORCH_BOX(&torch_mbv2::bindings::inverted_residual));
  m.impl("stem_block", TORCH_BOX(&torch_mbv2::bindings::stem_block));
  m.impl("conv_pool", TORCH_BOX(&torch_mbv2::bindings::conv_pool));
  m.impl("im2col", TORCH_BOX(&torch_mbv2::bindings::im2col));
}
