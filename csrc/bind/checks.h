// What ops check of their arguments, and how they say it. The Python package's fakes and stock
// implementations check the same, in the same order and the same words.
#pragma once

#include <cctype>
#include <cmath>
#include <cstdio>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "bind/value.h"

namespace torch_mbv2::bind {

// ------------------------------------------------------------------------------------- messages

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "torch_mbv2::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// As Python prints a tuple.
inline std::string tuple(const Ints& values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(values[i]);
  }
  return text + (values.size() == 1 ? ",)" : ")");
}

inline std::string shape(const Value& x) { return tuple(x.sizes); }

inline std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

// As Python names it, without "torch.".
inline std::string name(ScalarType type) {
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

inline std::string device(const Value& x) {
  if (x.device >= 0) return "cuda:" + std::to_string(x.device);
  return x.device == kCpu ? "cpu" : "another device";
}

// --------------------------------------------------------------------------------------- checks

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline void check_float(const char* op, const Value& x, const char* what = "input") {
  if (!is_supported(x.type)) {
    fail(op, what, " must be float32, float16 or bfloat16, got ", name(x.type));
  }
}

inline void check_size(const char* op, const char* what, int64_t channels, int64_t height,
                       int64_t width) {
  // Kernels address one image with 32-bit offsets; only the batch makes them 64-bit.
  if (__int128(channels) * height * width > std::numeric_limits<int32_t>::max()) {
    fail(op, "one image of ", what, " must have fewer than 2147483648 elements, got ",
         tuple({channels, height, width}));
  }
}

inline void check_image(const char* op, const Value& input) {
  check_float(op, input);
  if (input.dim() != 4) fail(op, "input must have shape (N, C, H, W), got ", shape(input));
  check_size(op, "input", input.size(1), input.size(2), input.size(3));
}

// The tensor whose dtype others must have.
struct Like {
  const char* what;
  const Value& value;
};

inline void check_alike(const char* op, const std::string& what, const Value& x, const Value& input,
                        const Like& like) {
  if (x.type != like.value.type) {
    fail(op, what, " must have the dtype of ", like.what, ", ", name(like.value.type), ", got ",
         name(x.type));
  }
  if (x.device != input.device) {
    fail(op, what, " must be on the device of input, ", device(input), ", got ", device(x));
  }
}

inline void check_alike(const char* op, const std::string& what, const Value& x,
                        const Value& input) {
  check_alike(op, what, x, input, {"input", input});
}

// `part` is what comes before "bias" and "weight" in the arguments' names.
inline void check_bias(const char* op, const std::optional<Value>& bias, int64_t channels,
                       const Value& input, const std::string& part, const Like& like) {
  if (!bias) return;
  check_alike(op, part + "bias", *bias, input, like);
  if (bias->dim() != 1 || bias->size(0) != channels) {
    fail(op, part, "bias must have shape (", channels, ",) from ", part, "weight, got ",
         shape(*bias));
  }
}

inline void check_bias(const char* op, const std::optional<Value>& bias, int64_t channels,
                       const Value& input) {
  check_bias(op, bias, channels, input, "", {"input", input});
}

inline void check_channels(const char* op, const Value& input) {
  if (input.size(1) < 1) fail(op, "input must have at least one channel, got ", shape(input));
}

inline void check_pixels(const char* op, const Value& input) {
  if (input.size(2) < 1 || input.size(3) < 1) {
    fail(op, "input must have at least one pixel, got ", shape(input));
  }
}

inline void check_ints(const char* op, const char* what, const Ints& values, size_t count,
                       int64_t least) {
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

inline void check_activation(const char* op, Bound act_min, Bound act_max) {
  if (act_min && act_max && !(*act_min <= *act_max)) {
    fail(op, "act_min must not exceed act_max, got ", number(*act_min), " and ", number(*act_max));
  }
  if (act_min && std::isnan(*act_min)) fail(op, "act_min must be a number or None, got nan");
  if (act_max && std::isnan(*act_max)) fail(op, "act_max must be a number or None, got nan");
}

inline void check_kernel_fits(const char* op, int64_t height, int64_t width, int64_t kernel_h,
                              int64_t kernel_w, const char* kernel = "kernel",
                              const char* image = "input") {
  if (kernel_h < 1 || kernel_w < 1 || height < kernel_h || width < kernel_w) {
    fail(op, "the ", kernel, " must fit into the padded ", image, ": dilated kernel ",
         tuple({kernel_h, kernel_w}), ", padded ", image, " ", tuple({height, width}));
  }
}

inline bool is_pointwise(const Value& weight, int64_t channels) {
  return weight.dim() == 4 && weight.size(1) == channels && weight.size(2) == 1 &&
         weight.size(3) == 1;
}

inline Clamp clamp(Bound act_min, Bound act_max) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  return {act_min ? float(*act_min) : -kInfinity, act_max ? float(*act_max) : kInfinity};
}

}  // namespace torch_mbv2::bind
