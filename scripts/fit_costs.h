// What the two programs of fit_costs.py share: problems as text, their candidates, and the
// constants of the cost models by name. Host only, no CUDA needed.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "plan/architecture.h"

namespace torch_mbv2::fit_costs {

using Problem = std::variant<plan::BlockProblem, plan::ProductProblem, plan::ConvPoolProblem>;

// Which cost model a problem is of.
inline const char* model_of(const Problem& problem) {
  constexpr const char* kNames[] = {"block", "product", "conv_pool"};
  return kNames[problem.index()];
}

inline constexpr int kImageSize = 224;  // of the image of a stem

namespace detail {

// Words NAME=VALUE behind the kind of a problem.
class Words {
 public:
  explicit Words(const std::string& text) : text_(text) {
    std::istringstream words(text);
    words >> kind;
    for (std::string word; words >> word;) {
      const size_t equals = word.find('=');
      if (equals == std::string::npos) fail("has a word without =");
      values_[word.substr(0, equals)] = word.substr(equals + 1);
    }
  }

  int64_t number(const char* name) const {
    char* end = nullptr;
    const std::string& value = word(name);
    const long long number = std::strtoll(value.c_str(), &end, 10);
    if (value.empty() || *end != '\0' || number < 0) fail(std::string("has no valid ") + name);
    return number;
  }

  DType dtype() const {
    const std::string& value = word("dtype");
    if (value == "float16") return DType::kFloat16;
    if (value == "float32") return DType::kFloat32;
    fail("has a dtype other than float16 and float32");
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("the problem '" + text_ + "' " + what);
  }

  std::string kind;

 private:
  const std::string& word(const char* name) const {
    const auto found = values_.find(name);
    if (found == values_.end()) fail(std::string("has no ") + name);
    return found->second;
  }

  std::string text_;
  std::map<std::string, std::string> values_;
};

inline plan::BlockProblem block_problem(const Words& words) {
  plan::BlockProblem p{};
  p.dtype = words.dtype();
  p.activation = {Activation::kClamp, 0, 6};
  p.batch = words.number("batch");
  p.e_h = p.e_w = int(words.number("map"));
  p.source_channels = int(words.number("source"));
  p.expanded = int(words.number("expanded"));
  p.out_channels = int(words.number("out"));
  p.stride_h = p.stride_w = int(words.number("stride"));
  if (p.stride_h < 1) words.fail("has no valid stride");
  p.window_h = p.window_w = 3;
  p.pad_top = p.pad_left = 1;
  p.out_h = p.out_w = (p.e_h - 1) / p.stride_h + 1;
  return p;
}

inline plan::BlockProblem stem_problem(const Words& words) {
  plan::BlockProblem p = block_problem(words);
  p.image = true;
  p.stem_window_h = p.stem_window_w = plan::kStemWindow;
  p.stem_stride_h = p.stem_stride_w = plan::kStemStride;
  p.stem_top = p.stem_left = 1;
  p.image_span = int64_t(kImageSize) * kImageSize * plan::kImageChannels - 1;
  if (p.e_h != kImageSize / plan::kStemStride) words.fail("has another map than the image's half");
  return p;
}

inline plan::ProductProblem product_problem(const Words& words) {
  const DType dtype = words.dtype();
  const int k = int(words.number("k"));
  return {.m = words.number("m"),
          .n = int(words.number("n")),
          .k = k,
          .batch = 1,
          .dtype = dtype,
          .matrix = true,
          .vectors = k % (16 / bytes_of(dtype)) == 0};
}

inline plan::ConvPoolProblem conv_pool_problem(const Words& words) {
  const int bytes = bytes_of(words.dtype());
  const int k = int(words.number("k"));
  return {.batch = words.number("batch"),
          .pixels = int(words.number("pixels")),
          .k = k,
          .n = int(words.number("n")),
          .element_bytes = bytes,
          .vectors = k % (16 / bytes) == 0};
}

}  // namespace detail

// Of one of these lines, in any order of the words; `batch` of a product is that of the images, and
// of no meaning here:
//   block dtype=float16 batch=8 map=14 source=64 expanded=384 out=64 stride=1
//   stem dtype=float16 batch=8 map=112 source=3 expanded=32 out=16 stride=1
//   product dtype=float32 batch=8 m=1568 n=384 k=64
//   conv_pool dtype=float16 batch=8 pixels=49 k=320 n=1280
inline Problem parse_problem(const std::string& text) {
  const detail::Words words(text);
  if (words.kind == "block") return detail::block_problem(words);
  if (words.kind == "stem") return detail::stem_problem(words);
  if (words.kind == "product") return detail::product_problem(words);
  if (words.kind == "conv_pool") return detail::conv_pool_problem(words);
  words.fail("is no block, stem, product or conv_pool");
}

struct Candidate {
  std::string name;
  std::variant<plan::BlockCut, plan::ProductPlan, plan::ConvPoolPlan> choice;
  double clocks;  // expected
};

namespace detail {

template <typename... Values>
std::string words(const char* format, Values... values) {
  char text[128];
  std::snprintf(text, sizeof(text), format, values...);
  return text;
}

inline std::vector<Candidate> all_of(const plan::BlockProblem& p, const Device& device,
                                     const plan::Architecture& a) {
  const plan::BlockPlan layout = plan::plan_block_layout(p);
  if (!layout.reason.empty()) throw std::runtime_error(layout.reason);
  std::vector<Candidate> found;
  for (const plan::BlockTile& t : plan::block_candidates(p, device, layout.layout, a.block)) {
    const plan::BlockCut& c = t.cut;
    found.push_back({words("kernel=%d,warps=%dx%d,images=%d,splits=%d", c.kernel, c.warps_x,
                           c.warps_y, c.images, c.splits),
                     c, t.clocks});
  }
  return found;
}

inline std::vector<Candidate> all_of(const plan::ProductProblem& p, const Device& device,
                                     const plan::Architecture& a) {
  std::vector<Candidate> found;
  for (const plan::ProductPlan& plan : plan::product_candidates(p, device, a.product)) {
    found.push_back({words("tile=%d", plan.tile), plan, plan.clocks});
  }
  return found;
}

inline std::vector<Candidate> all_of(const plan::ConvPoolProblem& p, const Device& device,
                                     const plan::Architecture& a) {
  std::vector<Candidate> found;
  for (const plan::ConvPoolPlan& plan : plan::conv_pool_candidates(p, device, a.conv_pool)) {
    const std::string name =
        words("instance=%d,warps=%d,images=%d", plan.instance, plan.warps, plan.images);
    // Several numbers of waves may come to the same plan, one after the other.
    if (found.empty() || found.back().name != name) found.push_back({name, plan, plan.clocks});
  }
  return found;
}

}  // namespace detail

// All of a problem, in the order of the plan, where ties go to the first.
inline std::vector<Candidate> candidates(const Problem& problem, const Device& device,
                                         const plan::Architecture& costs) {
  return std::visit([&](const auto& p) { return detail::all_of(p, device, costs); }, problem);
}

// A constant that is fitted. Those of a model that are not here were counted, not timed.
struct Constant {
  const char* name;
  double& (*of)(plan::Architecture& a);
  double least = 1e-6, most = std::numeric_limits<double>::max();  // that make sense
};

#define TORCH_MBV2_CONSTANT(model, member) \
  #model "." #member, [](plan::Architecture& a) -> double& { return a.model.member; }
inline constexpr Constant kConstants[] = {
    {TORCH_MBV2_CONSTANT(block, busy_instruction)},
    {TORCH_MBV2_CONSTANT(block, cluster_sum)},
    {TORCH_MBV2_CONSTANT(block, alone_instruction)},
    {TORCH_MBV2_CONSTANT(block, alone_product)},
    {TORCH_MBV2_CONSTANT(block, alone_start)},
    {TORCH_MBV2_CONSTANT(block, waits), 1},
    {TORCH_MBV2_CONSTANT(block, blend), 1, 32},
    {TORCH_MBV2_CONSTANT(product, bytes_a_clock)},
    {TORCH_MBV2_CONSTANT(product, output_bytes)},
    {TORCH_MBV2_CONSTANT(product, half_products)},
    {TORCH_MBV2_CONSTANT(product, float_products)},
    {TORCH_MBV2_CONSTANT(product, start)},
    {TORCH_MBV2_CONSTANT(product, half_chain)},
    {TORCH_MBV2_CONSTANT(product, half_chain_columns)},
    {TORCH_MBV2_CONSTANT(product, float_chain)},
    {TORCH_MBV2_CONSTANT(product, split_sum)},
    {TORCH_MBV2_CONSTANT(product, whole_waves), 1e-6, 1},
    {TORCH_MBV2_CONSTANT(conv_pool, product)},
    {TORCH_MBV2_CONSTANT(conv_pool, product_alone)},
    {TORCH_MBV2_CONSTANT(conv_pool, bytes_to_one)},
    {TORCH_MBV2_CONSTANT(conv_pool, bytes_to_each)},
    {TORCH_MBV2_CONSTANT(conv_pool, latency)},
    {TORCH_MBV2_CONSTANT(conv_pool, l1_piece)},
    {TORCH_MBV2_CONSTANT(conv_pool, direct_start)},
    {TORCH_MBV2_CONSTANT(conv_pool, resident_start)},
    {TORCH_MBV2_CONSTANT(conv_pool, resident_tile)},
    {TORCH_MBV2_CONSTANT(conv_pool, resident_tile_alone)},
    {TORCH_MBV2_CONSTANT(conv_pool, float_products)},
    {TORCH_MBV2_CONSTANT(conv_pool, float_step)},
};
#undef TORCH_MBV2_CONSTANT
// Whoever adds a constant decides whether it is fitted.
static_assert(sizeof(plan::ProductCosts) == 10 * sizeof(double));
static_assert(sizeof(plan::ConvPoolCosts) == 12 * sizeof(double));

}  // namespace torch_mbv2::fit_costs
