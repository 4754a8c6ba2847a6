#include "tests/conformance/paged_problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "kernels/cpu/page_packing.h"
#include "kernels/page_layout.h"
#include "tests/reference/attention_reference.h"

namespace attn::reference {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::kPageTokens;
using kernels::RowsView;
using kernels::Sequence;

// The first key that a query sees by position alone, one pair after the other; none: all of them.
std::int64_t FirstSeen(const AttentionArgs& args, const Sequence& sequence) {
  AttentionArgs unmasked = args;
  unmasked.mask = {};
  for (std::int64_t key = 0; key < sequence.kv_len; ++key) {
    for (std::int64_t row = 0; row < sequence.q_len; ++row) {
      if (Sees(unmasked, sequence, 0, row, key)) return key;
    }
  }
  return sequence.kv_len;
}

const void* ElementAt(const RowsView& rows, std::int64_t row, std::int64_t head, ElementType type) {
  return static_cast<const char*>(rows.data) +
         (row * rows.row_stride + head * rows.head_stride) * ElementBytes(type);
}

// What a token's key or value is after its way through int8: page_packing.h.
void Dequantise(std::vector<float>& token) {
  float largest = 0;
  for (const float x : token) largest = std::max(largest, std::fabs(x));
  const float scale = largest / 127.0f;
  for (float& x : token) x = scale == 0.0f ? 0.0f : std::nearbyint(x / scale) * scale;
}

}  // namespace

// One sequence's cache, twice.
struct PagedProblem::Row {
  std::int64_t first_token = 0;
  std::vector<std::unique_ptr<char, decltype(&std::free)>> memory;
  std::vector<const void*> blocks;
  std::vector<char> keys;  // [kv_len, num_kv_heads, head_dim]
  std::vector<char> values;
  kernels::KeyValueSpan span;
};

PagedProblem::PagedProblem(const ProblemCase& c, ElementType cache_dtype, bool let_go)
    : problem_(c), paged_(problem_.args()), dense_(problem_.args()) {
  paged_.paged = true;
  paged_.kv_dtype = dense_.kv_dtype = cache_dtype;
  if (cache_dtype == ElementType::kInt8) dense_.kv_dtype = ElementType::kFloat32;
  for (std::int64_t b = 0; b < paged_.num_sequences; ++b) {
    MakeRow(problem_.args().sequences[b], let_go, c.seed + static_cast<std::uint32_t>(b));
  }
  paged_.sequences = paged_sequences_.data();
  dense_.sequences = dense_sequences_.data();
}

PagedProblem::~PagedProblem() = default;

void PagedProblem::MakeRow(const Sequence& sequence, bool let_go, std::uint32_t seed) {
  Row& row = *rows_.emplace_back(std::make_unique<Row>());
  if (let_go) row.first_token = FirstSeen(problem_.args(), sequence);
  tokens_let_go_ += row.first_token;
  FillRows(sequence, row);
  FillPages(sequence, row, seed);

  Sequence& paged = paged_sequences_.emplace_back(sequence);
  paged.spans = nullptr;
  paged.num_spans = 0;
  const kernels::PageLayout layout = {paged_.kv_dtype, paged_.head_dim, paged_.value_dim};
  paged.pages = {row.blocks.data(), layout.page_bytes(), row.first_token};

  Sequence& dense = dense_sequences_.emplace_back(sequence);
  const std::int64_t heads = dense_.num_kv_heads;
  row.span = {{row.keys.data(), heads * dense_.head_dim, dense_.head_dim},
              {row.values.data(), heads * dense_.value_dim, dense_.value_dim},
              sequence.kv_len};
  dense.spans = &row.span;
  dense.num_spans = 1;
}

void PagedProblem::FillRows(const Sequence& sequence, Row& row) const {
  const auto fill = [&](const RowsView& from, std::int64_t dim, std::vector<char>& to) {
    const std::int64_t elements = sequence.kv_len * dense_.num_kv_heads * dim;
    to.resize(static_cast<std::size_t>(elements * ElementBytes(dense_.kv_dtype)) + 1);
    std::int64_t at = row.first_token * dense_.num_kv_heads * dim;
    for (std::int64_t token = row.first_token; token < sequence.kv_len; ++token) {
      for (std::int64_t head = 0; head < dense_.num_kv_heads; ++head) {
        const void* const source = ElementAt(from, token, head, dense_.dtype);
        std::vector<float> of_token;
        for (std::int64_t i = 0; i < dim; ++i) {
          of_token.push_back(static_cast<float>(ReadElement(dense_.dtype, source, i)));
        }
        if (paged_.kv_dtype == ElementType::kInt8) Dequantise(of_token);
        for (const float x : of_token) WriteElement(x, dense_.kv_dtype, to.data(), at++);
      }
    }
  };
  fill(sequence.spans[0].key, dense_.head_dim, row.keys);
  fill(sequence.spans[0].value, dense_.value_dim, row.values);
}

void PagedProblem::FillPages(const Sequence& sequence, Row& row, std::uint32_t seed) const {
  std::mt19937 random(seed);
  const kernels::PageLayout layout = {paged_.kv_dtype, paged_.head_dim, paged_.value_dim};
  const auto bytes = static_cast<std::size_t>(layout.page_bytes() * paged_.num_kv_heads);
  for (std::int64_t token = 0; token < sequence.kv_len; token += kPageTokens) {
    void* block = nullptr;
    if (token + kPageTokens > row.first_token) {
      block = std::aligned_alloc(kernels::kPageAlignment, bytes);
      std::memset(block, 0xff, bytes);  // NaN in every dtype
      row.memory.emplace_back(static_cast<char*>(block), &std::free);
    }
    row.blocks.push_back(block);
  }
  const kernels::KeyValueSpan& span = sequence.spans[0];
  for (std::int64_t token = row.first_token; token < sequence.kv_len;) {
    const std::int64_t within = token % kPageTokens;
    const std::int64_t room = std::min(kPageTokens - within, sequence.kv_len - token);
    const std::int64_t count = std::min<std::int64_t>(room, 1 + random() % 40);
    for (std::int64_t head = 0; head < paged_.num_kv_heads; ++head) {
      void* const page = static_cast<char*>(const_cast<void*>(
                             row.blocks[static_cast<std::size_t>(token / kPageTokens)])) +
                         head * layout.page_bytes();
      kernels::cpu::PackTokens(layout,
                               {paged_.dtype, ElementAt(span.key, token, head, paged_.dtype),
                                ElementAt(span.value, token, head, paged_.dtype),
                                span.key.row_stride, span.value.row_stride},
                               {within, count}, page);
    }
    token += count;
  }
}

}  // namespace attn::reference
