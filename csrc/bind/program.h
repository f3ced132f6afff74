// The text that tells a network what to run. One step a line, the first word an op, then its
// arguments in the order of its schema, separated by spaces:
//
//   %0  %1 ...                   the network's input, the value of the first step, ...
//   @256:float16:32x1x3x3        a tensor in the network's weights: first byte, dtype, shape; one
//                                of four dimensions lies in memory as channels_last
//   -                            None
//   1,1   2   0   6.0            ints, an int, a bool, a float
//
// The network's value is that of the last step. Besides the ops there are `flatten %n`, which makes
// (N, C) of (N, C, 1, 1), and `unflatten %n`, which does the opposite; neither moves anything.
#pragma once

#include <charconv>
#include <string>
#include <string_view>
#include <vector>

#include "bind/checks.h"

namespace torch_mbv2::bind {

inline std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  while (true) {
    const size_t end = text.find(separator);
    parts.push_back(text.substr(0, end));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + 1);
  }
}

// Reads the arguments of one step.
class StepReader {
 public:
  // `line` starts with the op; `values` are those of the network's input and the steps so far.
  StepReader(std::string_view line, const std::vector<Value>& values, const Value& weights)
      : words_(split(line, ' ')), values_(values), weights_(weights) {}

  std::string op() const { return std::string(words_[0]); }

  // Refuses a step that has not so many arguments.
  void expect(size_t arguments) const {
    if (words_.size() - 1 < arguments) refuse("an argument is missing");
    if (words_.size() - 1 > arguments) refuse("there are more arguments than it takes");
  }

  // The next argument.
  template <typename T>
  T read() {
    const std::string_view word = words_[next_++];
    if constexpr (std::is_same_v<T, Value>) {
      return value(word);
    } else if constexpr (std::is_same_v<T, std::optional<Value>>) {
      return word == "-" ? std::nullopt : std::optional(value(word));
    } else if constexpr (std::is_same_v<T, Ints>) {
      Ints list;
      for (const std::string_view part : split(word, ',')) list.push_back(parse<int64_t>(part));
      return list;
    } else if constexpr (std::is_same_v<T, int64_t>) {
      return parse<int64_t>(word);
    } else if constexpr (std::is_same_v<T, bool>) {
      return parse<int64_t>(word) != 0;
    } else if constexpr (std::is_same_v<T, std::optional<int64_t>>) {
      return word == "-" ? std::nullopt : std::optional(parse<int64_t>(word));
    } else {
      static_assert(std::is_same_v<T, Bound>);
      return word == "-" ? std::nullopt : std::optional(parse<double>(word));
    }
  }

  [[noreturn]] void refuse(const std::string& why) const {
    fail("network", "step ", values_.size(), " of the program, ", words_[0], ": ", why);
  }

 private:
  template <typename T>
  T parse(std::string_view word) const {
    T value{};
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
    if (error != std::errc() || end != word.data() + word.size()) {
      refuse("a number was expected, got '" + std::string(word) + "'");
    }
    return value;
  }

  Value value(std::string_view word) const {
    if (word.starts_with('%')) {
      const int64_t index = parse<int64_t>(word.substr(1));
      if (index < 0 || index >= int64_t(values_.size())) {
        refuse("there is no value " + std::string(word) + " before it");
      }
      return values_[size_t(index)];
    }
    if (word.starts_with('@')) return weight(word);
    refuse("a value (%0) or a weight (@0:float32:8x8) was expected, got '" + std::string(word) +
           "'");
  }

  Value weight(std::string_view word) const {
    const std::string no_weight =
        "a weight must be @byte:dtype:shape, got '" + std::string(word) + "'";
    const auto parts = split(word.substr(1), ':');
    if (parts.size() != 3) refuse(no_weight);
    Value x{};
    x.device = weights_.device;
    x.handle = -1;
    const auto type = type_called(parts[1]);
    if (!type) refuse(no_weight);
    x.type = *type;
    const auto sizes = split(parts[2], 'x');
    if (sizes.size() > 4) refuse(no_weight);
    __int128 bytes = element_size(x.type);
    for (const std::string_view size : sizes) {
      x.sizes.push_back(parse<int64_t>(size));
      if (x.sizes.back() < 0 || x.sizes.back() > std::numeric_limits<int32_t>::max()) {
        refuse(no_weight);
      }
      bytes *= x.sizes.back();
    }
    x.strides = strides_of(x.sizes, x.dim() == 4 ? Layout::kChannelsLast : Layout::kContiguous);
    const int64_t first = parse<int64_t>(parts[0]);
    if (first < 0 || first % 16 != 0 || first > weights_.numel() ||
        bytes > weights_.numel() - first) {
      refuse("'" + std::string(word) +
             "' must start at a multiple of 16 bytes and lie inside the " +
             std::to_string(weights_.numel()) + " bytes of weights");
    }
    x.data = static_cast<char*>(weights_.data) + first;
    return x;
  }

  std::vector<std::string_view> words_;
  size_t next_ = 1;
  const std::vector<Value>& values_;
  const Value& weights_;
};

}  // namespace torch_mbv2::bind
