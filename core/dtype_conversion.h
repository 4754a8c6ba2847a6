// Conversion between the three floating dtypes in plain loops, for weights at load time (requests'
// tensors are converted by LibTorch on the executor).
#pragma once

#include <cstddef>

#include "core/dtype.h"

namespace attn {

// Converts `count` elements, rounding to nearest even (IEEE: float16 overflows to infinity, NaN
// stays NaN). Both dtypes are floating. Neither pointer needs an alignment; the ranges do not
// overlap. Equal dtypes are copied bit by bit.
void ConvertElements(const void* source, DType from, void* target, DType to, std::size_t count);

}  // namespace attn
