// How an op, a function Value(Context&, arguments...), becomes what the dispatcher calls and a step
// of a network: both follow from its signature.
#pragma once

#include <torch/csrc/stable/library.h>

#include <map>
#include <tuple>
#include <type_traits>

#include "bind/program.h"
#include "bind/tensors.h"

namespace torch_mbv2::bind {

// What the dispatcher hands over for an argument of an op.
template <typename T>
struct Boxed {
  using Type = T;
  static T take(TensorContext&, T x) { return x; }
};
template <>
struct Boxed<Value> {
  using Type = Tensor;
  static Value take(TensorContext& c, Tensor x) { return c.add(std::move(x)); }
};
template <>
struct Boxed<std::optional<Value>> {
  using Type = std::optional<Tensor>;
  static std::optional<Value> take(TensorContext& c, std::optional<Tensor> x) {
    return x ? std::optional(c.add(std::move(*x))) : std::nullopt;
  }
};

template <auto kOp>
struct Entry;
template <typename... A, Value (*kOp)(Context&, A...)>
struct Entry<kOp> {
  // Runs on tensors.
  static Tensor call(typename Boxed<A>::Type... arguments) {
    TensorContext context;
    std::tuple<A...> taken{Boxed<A>::take(context, std::move(arguments))...};
    return context.tensor(
        std::apply([&](A&... a) { return kOp(context, std::move(a)...); }, taken));
  }
  // Runs on what a step of a program says.
  static Value step(Context& context, StepReader& reader) {
    reader.expect(sizeof...(A));
    std::tuple<A...> read{reader.read<A>()...};
    return std::apply([&](A&... a) { return kOp(context, std::move(a)...); }, read);
  }
};

using StepFunction = Value (*)(Context&, StepReader&);

// The ops that a network may call, by name.
std::map<std::string, StepFunction>& step_functions();

struct StepRegistration {
  StepRegistration(const char* name, StepFunction step) { step_functions()[name] = step; }
};

}  // namespace torch_mbv2::bind

// At the foot of an op's file: its schema, its implementation for CUDA, and its step.
#define TORCH_MBV2_OP(op, schema)                                                        \
  STABLE_TORCH_LIBRARY_FRAGMENT(torch_mbv2, library) { library.def(schema); }            \
  STABLE_TORCH_LIBRARY_IMPL(torch_mbv2, CUDA, library) {                                 \
    library.impl(#op, TORCH_BOX(&torch_mbv2::bind::Entry<&torch_mbv2::bind::op>::call)); \
  }                                                                                      \
  static const torch_mbv2::bind::StepRegistration op##_step(                             \
      #op, &torch_mbv2::bind::Entry<&torch_mbv2::bind::op>::step);
