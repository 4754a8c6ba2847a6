// What the units that use LibTorch share: views as tensors, and what LibTorch allocates by itself.
// ATen's headers cost seconds a unit, so only *.cc files that call it include this one.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "absl/status/status.h"
#include "core/tensor_view.h"
#include "core/workspace.h"

namespace attn {

c10::ScalarType ToScalarType(DType dtype);

// A tensor over the view's memory; it must not outlive it, and is not written through a view that
// is only read.
at::Tensor AsTensor(const TensorView& view);

// While it lives, CPU memory that LibTorch allocates on this thread is counted on `meter`.
class AllocationScope {
 public:
  explicit AllocationScope(MemoryMeter& meter);
  ~AllocationScope();
  AllocationScope(const AllocationScope&) = delete;
  AllocationScope& operator=(const AllocationScope&) = delete;
};

// Runs `body` without autograd, with allocations counted; LibTorch's exceptions become a status
// here and nowhere else.
absl::Status RunTorch(MemoryMeter& meter, const std::function<void()>& body);

}  // namespace attn
