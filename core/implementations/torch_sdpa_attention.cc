#include "core/implementations/torch_sdpa_attention.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "core/error.h"
#include "core/implementations/plain_rows.h"
#include "core/torch_support.h"

namespace attn {
namespace {

using kernels::AttentionArgs;
using kernels::KeyValueSpan;
using kernels::RowsView;
using kernels::Sequence;

// [batch, heads, length, dim] over rows of a kernel's struct.
at::Tensor Rows(const void* data, DType dtype, std::int64_t batch, std::int64_t batch_stride,
                std::int64_t heads, std::int64_t head_stride, std::int64_t length,
                std::int64_t row_stride, std::int64_t dim) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.rank = 4;
  view.extents = {batch, heads, length, dim};
  view.strides = {batch_stride, head_stride, row_stride, 1};
  return AsTensor(view);
}

DType MaskDType(kernels::MaskType type) {
  switch (type) {
    case kernels::MaskType::kFloat32:
      return DType::kFloat32;
    case kernels::MaskType::kFloat16:
      return DType::kFloat16;
    case kernels::MaskType::kBFloat16:
      return DType::kBFloat16;
    case kernels::MaskType::kBool:
    case kernels::MaskType::kNone:
      break;
  }
  return DType::kBool;
}

// Whether rows `a`, `b` and `c` lie at equal distances, as the rows of a strided tensor do.
template <typename View>
bool AreEven(const View& a, const View& b, const View& c) {
  const auto address = [](const View& view) { return reinterpret_cast<std::uintptr_t>(view.data); };
  return address(b) - address(a) == address(c) - address(b) && a.row_stride == c.row_stride &&
         a.head_stride == c.head_stride;
}

// Whether row `i` continues the rows before it, so that one call of the operator serves them all:
// the same lengths and position, and tensors and mask that go on as they began.
bool Continues(const AttentionArgs& args, std::int64_t i) {
  const Sequence& first = args.sequences[0];
  const Sequence& row = args.sequences[i];
  if (row.q_len != first.q_len || row.kv_len != first.kv_len || row.num_spans != first.num_spans ||
      row.first_query_position != first.first_query_position) {
    return false;
  }
  if (args.mask.batch_stride != 0 && row.mask_row != first.mask_row + i) return false;
  for (std::int64_t s = 0; s < row.num_spans; ++s) {
    if (row.spans[s].length != first.spans[s].length) return false;
  }
  if (i == 1) return true;
  const Sequence& a = args.sequences[i - 2];
  const Sequence& b = args.sequences[i - 1];
  bool even = AreEven(a.query, b.query, row.query) && AreEven(a.output, b.output, row.output);
  for (std::int64_t s = 0; s < row.num_spans; ++s) {
    even = even && AreEven(a.spans[s].key, b.spans[s].key, row.spans[s].key) &&
           AreEven(a.spans[s].value, b.spans[s].value, row.spans[s].value);
  }
  return even;
}

bool IsOneCall(const AttentionArgs& args) {
  for (std::int64_t i = 1; i < args.num_sequences; ++i) {
    if (!Continues(args, i)) return false;
  }
  return true;
}

// Rows [first, first + batch) of the problem, which are alike: one call of the operator.
class Group {
 public:
  Group(const AttentionArgs& args, const AttentionShape& shape, std::int64_t first,
        std::int64_t batch, ExecutionContext& context)
      : args_(args),
        shape_(shape),
        sequence_(args.sequences[first]),
        batch_(batch),
        context_(context) {}

  void Run() {
    at::Tensor output = Rows(sequence_.output.data, shape_.output_dtype, batch_, OutputStride(),
                             args_.num_heads, sequence_.output.head_stride, sequence_.q_len,
                             sequence_.output.row_stride, args_.value_dim);
    if (sequence_.q_len == 0) return;
    if (sequence_.kv_len == 0) {
      output.zero_();
      return;
    }
    // float32, where the cache has another dtype than the query
    const at::Tensor query =
        Rows(sequence_.query.data, shape_.dtype, batch_, BatchStride(&Sequence::query),
             args_.num_heads, sequence_.query.head_stride, sequence_.q_len,
             sequence_.query.row_stride, args_.head_dim)
            .to(ToScalarType(shape_.kv_dtype));
    const at::Tensor key = Keys(&KeyValueSpan::key, args_.head_dim);
    const at::Tensor value = Keys(&KeyValueSpan::value, args_.value_dim);
    // The operator's own causality is that of a square matrix: anything else goes through the mask.
    const bool plain_causal =
        args_.is_causal && sequence_.first_query_position == 0 && !NeedsMask(true);
    const at::Tensor hidden = plain_causal ? at::Tensor() : Hidden(query.options());
    std::optional<at::Tensor> mask;
    if (!plain_causal) mask = MaskOf(query, hidden);
    at::Tensor result = at::scaled_dot_product_attention(query, key, value, mask, 0.0, plain_causal,
                                                         static_cast<double>(args_.scale),
                                                         args_.num_heads != args_.num_kv_heads);
    output.copy_(result);
  }

 private:
  // Distances between the rows of a dense batch; a single row needs none.
  std::int64_t BatchStride(RowsView Sequence::*rows) const {
    return batch_ == 1 ? 0 : Distance((&sequence_)[0].*rows, (&sequence_)[1].*rows, shape_.dtype);
  }
  static std::int64_t Distance(const RowsView& a, const RowsView& b, DType dtype) {
    return (static_cast<const char*>(b.data) - static_cast<const char*>(a.data)) /
           static_cast<std::int64_t>(ItemSize(dtype));
  }
  std::int64_t OutputStride() const {
    if (batch_ == 1) return 0;
    return (static_cast<char*>((&sequence_)[1].output.data) -
            static_cast<char*>(sequence_.output.data)) /
           static_cast<std::int64_t>(ItemSize(shape_.output_dtype));
  }

  at::Tensor Keys(RowsView KeyValueSpan::*rows, std::int64_t dim) const {
    std::vector<at::Tensor> parts;
    for (std::int64_t s = 0; s < sequence_.num_spans; ++s) {
      const KeyValueSpan& span = sequence_.spans[s];
      const std::int64_t stride =
          batch_ == 1 ? 0 : Distance(span.*rows, (&sequence_)[1].spans[s].*rows, shape_.kv_dtype);
      parts.push_back(Rows((span.*rows).data, shape_.kv_dtype, batch_, stride, args_.num_kv_heads,
                           (span.*rows).head_stride, span.length, (span.*rows).row_stride, dim));
    }
    if (parts.size() == 1) return parts.front();
    at::Tensor joined = at::cat(parts, 2);
    context_.packed_input_bytes += joined.nbytes();
    return joined;
  }

  bool NeedsMask(bool causality_is_native) const {
    return args_.mask.type != kernels::MaskType::kNone || args_.window_left >= 0 ||
           args_.window_right >= 0 || (args_.is_causal && !causality_is_native);
  }

  // True where position alone hides a key: [q_len, kv_len]; undefined where it hides none.
  at::Tensor Hidden(const c10::TensorOptions& like) const {
    at::Tensor hidden;
    if (!args_.is_causal && args_.window_left < 0 && args_.window_right < 0) return hidden;
    const auto options = like.dtype(c10::ScalarType::Long);
    const at::Tensor keys = at::arange(sequence_.kv_len, options).unsqueeze(0);
    const at::Tensor queries = at::arange(sequence_.first_query_position,
                                          sequence_.first_query_position + sequence_.q_len, options)
                                   .unsqueeze(1);
    // Comparisons of a row with a column: nothing but the bool result is as large as the scores.
    const auto add = [&](const at::Tensor& where) {
      if (hidden.defined()) {
        hidden.logical_or_(where);
      } else {
        hidden = where;
      }
    };
    if (args_.is_causal) add(keys.gt(queries));
    if (args_.window_left >= 0) add(keys.lt(queries.sub(args_.window_left)));
    if (args_.window_right >= 0) add(keys.gt(queries.add(args_.window_right)));
    return hidden;
  }

  // The operator's mask: what the request gave, what position hides, and keys beyond the mask's own
  // extent.
  std::optional<at::Tensor> MaskOf(const at::Tensor& query, const at::Tensor& hidden) const {
    const kernels::Mask& given = args_.mask;
    if (given.type == kernels::MaskType::kNone) {
      if (!hidden.defined()) return std::nullopt;
      return hidden.logical_not();
    }
    const DType dtype = MaskDType(given.type);
    const std::int64_t extent =
        given.key_stride == 0 ? sequence_.kv_len : std::min(given.kv_extent, sequence_.kv_len);
    TensorView view;
    view.data =
        static_cast<const char*>(given.data) +
        sequence_.mask_row * given.batch_stride * static_cast<std::int64_t>(ItemSize(dtype));
    view.dtype = dtype;
    view.rank = 4;
    view.extents = {given.batch_stride == 0 ? 1 : batch_,
                    given.head_stride == 0 ? 1 : args_.num_heads,
                    given.query_stride == 0 ? 1 : sequence_.q_len, extent};
    view.strides = {given.batch_stride, given.head_stride, given.query_stride, given.key_stride};
    at::Tensor mask = AsTensor(view);
    const bool boolean = dtype == DType::kBool;
    // The operator takes a mask of the query's dtype or of float32: rounding it would move scores.
    if (!boolean && mask.scalar_type() != query.scalar_type()) {
      mask = mask.to(c10::ScalarType::Float);
    }
    if (extent < sequence_.kv_len) {
      at::Tensor rest = at::zeros(
          {mask.size(0), mask.size(1), mask.size(2), sequence_.kv_len - extent}, mask.options());
      if (!boolean) rest.fill_(-std::numeric_limits<float>::infinity());
      mask = at::cat({mask, rest}, 3);
    }
    if (!hidden.defined()) return mask;
    return boolean ? mask.logical_and(hidden.logical_not())
                   : mask.masked_fill(hidden, -std::numeric_limits<float>::infinity());
  }

  const AttentionArgs& args_;
  const AttentionShape& shape_;
  const Sequence& sequence_;
  const std::int64_t batch_;
  ExecutionContext& context_;
};

class TorchSdpaAttention final : public AttentionImplementation {
 public:
  absl::Status Attend(const AttentionArgs& given, const AttentionShape& given_shape,
                      ExecutionContext& context) const override {
    ATTN_ASSIGN_OR_RETURN(const PlainRows rows, PlainRows::Create(given, given_shape, context));
    const AttentionArgs& args = rows.args();
    const AttentionShape& shape = rows.shape();
    const ComputeComplexity work = AttentionComplexity(shape);
    ATTN_RETURN_IF_ERROR(RunTorch(context.workspace.meter(), [&] {
      const std::int64_t step = IsOneCall(args) ? std::max<std::int64_t>(shape.batch, 1) : 1;
      for (std::int64_t first = 0; first < args.num_sequences; first += step) {
        if (context.IsCancelled()) return;
        Group(args, shape, first, step, context).Run();
      }
    }));
    context.flops += work.flops;
    return absl::OkStatus();
  }

  MemoryUsage WorkspaceBytes(const AttentionShape& shape, int workers) const override {
    // The fused operator holds tiles per thread and its result; the general one, the scores. Masks
    // are expanded.
    const auto result =
        static_cast<std::uint64_t>(shape.batch * shape.q_len * shape.num_heads * shape.value_dim) *
        ItemSize(shape.dtype);
    const bool fused = shape.head_dim == shape.value_dim;
    const auto pairs = static_cast<std::uint64_t>(shape.longest_pairs);
    const std::uint64_t scores =
        fused
            ? 0
            : 2 * pairs * static_cast<std::uint64_t>(shape.batch * shape.num_heads) * sizeof(float);
    constexpr std::uint64_t kTileBytes = 1 << 20;
    return {PlainRows::WorkspaceBytes(shape) + result + scores + 3 * pairs +
                kTileBytes * static_cast<std::uint64_t>(workers),
            false};
  }
};

absl::Status Supports(const AttentionShape& shape) {
  if (shape.output_dtype != shape.dtype) {
    return Unsupported("torch_sdpa rounds its output to the query's dtype");
  }
  if (shape.stage != kernels::ScoreStage::kNone) {
    return Unsupported("torch_sdpa does not form the attention weights");
  }
  if (shape.output_lse) return Unsupported("torch_sdpa does not return the log-sum-exp");
  if (shape.has_soft_cap) return Unsupported("torch_sdpa has no soft cap");
  if (shape.has_alibi) return Unsupported("torch_sdpa has no ALiBi slopes");
  if (shape.has_sinks) return Unsupported("torch_sdpa has no sink logits");
  return absl::OkStatus();
}

}  // namespace

ImplementationRow TorchSdpaAttentionRow() {
  Traits traits;
  traits.backends = {"cpu"};
  traits.dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  traits.exact = true;
  traits.memory = "O(n)";
  traits.compute = "O(n^2 d)";
  traits.description = "LibTorch's fused scaled_dot_product_attention; memory is an estimate";
  return {"torch_sdpa", std::move(traits), &Supports,
          [] { return std::unique_ptr<AttentionImplementation>(new TorchSdpaAttention); }};
}

}  // namespace attn
