// A tensor that somebody else owns: pointer, dtype, extents, strides, device. Kernels and modules
// read and write through views; they neither own nor allocate what they are given. Data need not be
// aligned beyond what loads tolerate.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "core/dtype.h"

namespace attn {

inline constexpr int kMaxRank = 5;
inline constexpr int kCpuDevice = 0;

template <typename Pointer>
struct BasicTensorView {
  Pointer data = nullptr;
  DType dtype = DType::kUnspecified;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> extents{};
  std::array<std::int64_t, kMaxRank> strides{};  // in elements
  int device = kCpuDevice;

  BasicTensorView() = default;

  // Dense and row-major.
  BasicTensorView(Pointer base, DType type, std::initializer_list<std::int64_t> shape)
      : BasicTensorView(base, type, shape.begin(), static_cast<int>(shape.size())) {}
  BasicTensorView(Pointer base, DType type, const std::int64_t* shape, int shape_rank)
      : data(base), dtype(type), rank(shape_rank) {
    std::int64_t stride = 1;
    for (int i = rank - 1; i >= 0; --i) {
      extents[static_cast<std::size_t>(i)] = shape[i];
      strides[static_cast<std::size_t>(i)] = stride;
      stride *= shape[i];
    }
  }

  // A view that is written can be read.
  template <typename Other, typename = std::enable_if_t<std::is_convertible_v<Other, Pointer>>>
  BasicTensorView(const BasicTensorView<Other>& other)  // NOLINT(google-explicit-constructor)
      : data(other.data),
        dtype(other.dtype),
        rank(other.rank),
        extents(other.extents),
        strides(other.strides),
        device(other.device) {}

  // Whether the tensor was given at all: one without elements has a shape and may have no data.
  bool defined() const { return dtype != DType::kUnspecified; }
  std::int64_t extent(int axis) const { return extents[static_cast<std::size_t>(axis)]; }
  std::int64_t stride(int axis) const { return strides[static_cast<std::size_t>(axis)]; }
  std::int64_t num_elements() const {
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= extent(i);
    return n;
  }
  std::size_t bytes() const { return static_cast<std::size_t>(num_elements()) * ItemSize(dtype); }
};

using TensorView = BasicTensorView<const void*>;
using MutableTensorView = BasicTensorView<void*>;

// "[2, 8, 37, 64]"
std::string ShapeText(const TensorView& view);

}  // namespace attn
