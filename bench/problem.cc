#include "bench/problem.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/attention_implementation.h"
#include "core/error.h"
#include "kernels/cpu/page_packing.h"
#include "kernels/page_layout.h"

namespace attn::bench {
namespace {

using kernels::ElementType;
using kernels::kPageTokens;

absl::StatusOr<DType> DTypeNamed(const std::string& name) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8}) {
    if (name == DTypeName(dtype)) return dtype;
  }
  return InvalidField("dtype", absl::StrCat("there is no dtype ", name));
}

// The element type of queries, or of pages. A dtype that this build's kernels have no element type
// for is refused: they would take it for another.
absl::StatusOr<ElementType> ElementTypeNamed(const std::string& name) {
  ATTN_ASSIGN_OR_RETURN(const DType dtype, DTypeNamed(name));
  const ElementType type = ToElementType(dtype);
  if (FromElementType(type) != dtype) {
    return absl::UnimplementedError(absl::StrCat(name, " is not available"));
  }
  return type;
}

std::size_t Bytes(std::int64_t elements, const std::string& dtype) {
  return static_cast<std::size_t>(elements) * ItemSize(*DTypeNamed(dtype));
}

absl::StatusOr<Buffer> CopyOf(Device& device, const void* data, std::size_t bytes) {
  ATTN_ASSIGN_OR_RETURN(Buffer buffer, device.Allocate(bytes));
  device.Copy(buffer.data.get(), data, bytes);
  return buffer;
}

std::int64_t BlocksOf(const ProblemSpec& spec) {
  return (spec.kv_len + kPageTokens - 1) / kPageTokens;
}

absl::Status CheckSpec(const ProblemSpec& spec) {
  for (const std::int64_t extent :
       {spec.batch, spec.num_heads, spec.num_kv_heads, spec.q_len, spec.kv_len, spec.head_dim,
        spec.value_dim, spec.cache_copies}) {
    if (extent < 1) return InvalidField("shape", "every extent must be at least 1");
  }
  if (spec.num_heads % spec.num_kv_heads != 0) {
    return InvalidField("num_kv_heads", absl::StrCat(spec.num_kv_heads, " does not divide ",
                                                     spec.num_heads, " heads"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Problem>> Problem::Create(Device& device, const ProblemSpec& spec,
                                                         const PlainTensors& tensors) {
  ATTN_RETURN_IF_ERROR(CheckSpec(spec));
  std::unique_ptr<Problem> problem(new Problem(device, spec));
  ATTN_ASSIGN_OR_RETURN(problem->dtype_, ElementTypeNamed(spec.dtype));
  const bool paged = !spec.cache_dtype.empty();
  ATTN_ASSIGN_OR_RETURN(problem->cache_dtype_,
                        ElementTypeNamed(paged ? spec.cache_dtype : spec.dtype));
  ATTN_RETURN_IF_ERROR(problem->CopyTensors(tensors));
  if (paged) ATTN_RETURN_IF_ERROR(problem->PackPages(tensors));
  for (std::int64_t copy = 0; copy < (paged ? spec.cache_copies : 1); ++copy) {
    problem->AddArgs(copy);
  }
  return problem;
}

absl::Status Problem::CopyTensors(const PlainTensors& tensors) {
  const ProblemSpec& s = spec_;
  const std::int64_t queries = s.batch * s.num_heads * s.q_len;
  const std::int64_t keys = s.batch * s.num_kv_heads * s.kv_len;
  ATTN_ASSIGN_OR_RETURN(query_,
                        CopyOf(device_, tensors.query, Bytes(queries * s.head_dim, s.dtype)));
  ATTN_ASSIGN_OR_RETURN(output_, device_.Allocate(Bytes(queries * s.value_dim, s.dtype)));
  device_.Fill(output_.data.get(), 0xff, output_.bytes);  // NaN
  if (!s.cache_dtype.empty()) return absl::OkStatus();
  ATTN_ASSIGN_OR_RETURN(key_, CopyOf(device_, tensors.key, Bytes(keys * s.head_dim, s.dtype)));
  ATTN_ASSIGN_OR_RETURN(value_, CopyOf(device_, tensors.value, Bytes(keys * s.value_dim, s.dtype)));
  return absl::OkStatus();
}

// Blocks as a session's cache has them: 64 tokens, a page for each KV head.
absl::Status Problem::PackPages(const PlainTensors& tensors) {
  const ProblemSpec& s = spec_;
  const kernels::PageLayout layout = {cache_dtype_, s.head_dim, s.value_dim};
  const auto block_bytes = static_cast<std::size_t>(layout.page_bytes() * s.num_kv_heads);
  for (std::int64_t i = 0; i < s.cache_copies * s.batch * BlocksOf(s); ++i) {
    const std::int64_t sequence = i / BlocksOf(s) % s.batch;
    const std::int64_t token = i % BlocksOf(s) * kPageTokens;
    ATTN_ASSIGN_OR_RETURN(Buffer block, device_.Allocate(block_bytes));
    device_.Fill(block.data.get(), 0, block_bytes);
    for (std::int64_t head = 0; head < s.num_kv_heads; ++head) {
      const std::int64_t row = (sequence * s.num_kv_heads + head) * s.kv_len + token;
      kernels::cpu::PackTokens(
          layout,
          {dtype_, static_cast<const char*>(tensors.key) + Bytes(row * s.head_dim, s.dtype),
           static_cast<const char*>(tensors.value) + Bytes(row * s.value_dim, s.dtype), s.head_dim,
           s.value_dim},
          {0, std::min(kPageTokens, s.kv_len - token)},
          static_cast<char*>(block.data.get()) + head * layout.page_bytes());
    }
    blocks_.push_back(block.data.get());
    pages_.push_back(std::move(block));
  }
  return absl::OkStatus();
}

void Problem::AddArgs(std::int64_t copy) {
  const ProblemSpec& s = spec_;
  kernels::AttentionArgs args;
  args.dtype = args.output_dtype = dtype_;
  args.kv_dtype = cache_dtype_;
  args.num_heads = s.num_heads;
  args.num_kv_heads = s.num_kv_heads;
  args.head_dim = s.head_dim;
  args.value_dim = s.value_dim;
  args.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  args.is_causal = s.is_causal;
  args.paged = !s.cache_dtype.empty();
  std::vector<kernels::Sequence>& sequences = sequences_.emplace_back();
  const auto at = [&](const Buffer& buffer, std::int64_t rows, std::int64_t dim) {
    return static_cast<char*>(buffer.data.get()) + Bytes(rows * dim, s.dtype);
  };
  for (std::int64_t b = 0; b < s.batch; ++b) {
    const std::int64_t query_row = b * s.num_heads * s.q_len;
    kernels::Sequence& sequence = sequences.emplace_back();
    sequence.q_len = s.q_len;
    sequence.kv_len = s.kv_len;
    sequence.first_query_position = s.kv_len - s.q_len;
    sequence.mask_row = b;
    sequence.query = {at(query_, query_row, s.head_dim), s.head_dim, s.q_len * s.head_dim};
    sequence.output = {at(output_, query_row, s.value_dim), s.value_dim, s.q_len * s.value_dim};
    if (args.paged) {
      const kernels::PageLayout layout = {cache_dtype_, s.head_dim, s.value_dim};
      sequence.pages = {blocks_.data() + (copy * s.batch + b) * BlocksOf(s), layout.page_bytes(),
                        0};
    } else {
      const std::int64_t key_row = b * s.num_kv_heads * s.kv_len;
      sequence.spans = &spans_.emplace_back(kernels::KeyValueSpan{
          {at(key_, key_row, s.head_dim), s.head_dim, s.kv_len * s.head_dim},
          {at(value_, key_row, s.value_dim), s.value_dim, s.kv_len * s.value_dim},
          s.kv_len});
      sequence.num_spans = 1;
    }
  }
  args.sequences = sequences.data();
  args.num_sequences = s.batch;
  args_.push_back(args);
}

const kernels::AttentionArgs& Problem::Next() {
  const kernels::AttentionArgs& args = args_[next_];
  next_ = (next_ + 1) % args_.size();
  return args;
}

}  // namespace attn::bench
