#include "core/tensor_view.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"

namespace attn {

std::string ShapeText(const TensorView& view) {
  return absl::StrCat(
      "[",
      absl::StrJoin(absl::MakeConstSpan(view.extents.data(), static_cast<std::size_t>(view.rank)),
                    ", "),
      "]");
}

}  // namespace attn
