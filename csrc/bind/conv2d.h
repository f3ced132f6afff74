// What the ops share that run a convolution.
#pragma once

#include "bind/context.h"

namespace torch_mbv2::bind {

// Elements from the first to the last of one image of a (N, C, H, W) tensor of any strides.
int64_t image_span(const Value& x);

// Ops that others are made of where no kernel of their own takes them.
Value inverted_residual(Context& context, Value input, std::optional<Value> expand_weight,
                        std::optional<Value> expand_bias, Value depthwise_weight,
                        std::optional<Value> depthwise_bias, Value project_weight,
                        std::optional<Value> project_bias, std::optional<Value> packed, Ints stride,
                        Ints padding, bool residual, Bound act_min, Bound act_max);
Value add(Context& context, Value input, Value other, Bound act_min, Bound act_max);
Value conv2d(Context& context, Value input, Value weight, std::optional<Value> bias, Ints stride,
             Ints padding, Ints dilation, int64_t groups, Bound act_min, Bound act_max);

}  // namespace torch_mbv2::bind
