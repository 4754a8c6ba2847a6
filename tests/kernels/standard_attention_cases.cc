#include "tests/kernels/standard_attention_cases.h"

#include <cstdint>
#include <limits>

namespace attn::reference {
namespace {

using kernels::ElementType;
using kernels::MaskType;
using kernels::ScoreStage;

constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kFloat16,
                                  ElementType::kBFloat16};
constexpr MaskType kMasks[] = {MaskType::kBool, MaskType::kFloat32, MaskType::kFloat16,
                               MaskType::kBFloat16};

// Sizes at which blocks of rows, panels of keys and columns all have a remainder.
ProblemCase Base() {
  ProblemCase c;
  c.batch = 2;
  c.heads = 4;
  c.kv_heads = 2;
  c.q_len = 13;
  c.kv_len = 75;
  c.head_dim = 20;
  c.value_dim = 36;
  c.lse = true;
  return c;
}

}  // namespace

std::vector<ProblemCase> LengthCases() {
  std::vector<ProblemCase> cases;
  // 0, 1, w - 1, w, w + 1 and 2w + 3 for vectors of 4, 8 and 16 lanes and for panels of 64 keys.
  for (const int64_t kv_len : {0, 1, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 19, 35, 63, 64, 65, 131}) {
    for (const int64_t q_len : {0, 1, 3, 4, 5, 6, 7, 15}) {
      ProblemCase c = Base();
      c.batch = 1;
      c.q_len = q_len;
      c.kv_len = kv_len;
      cases.push_back(c);
    }
  }
  ProblemCase c = Base();
  c.q_len = 64;
  c.kv_len = 4200;  // several looks at `cancelled` within a row
  c.heads = c.kv_heads = 1;
  cases.push_back(c);
  c.q_len = 2;
  cases.push_back(c);
  return cases;
}

std::vector<ProblemCase> DimensionCases() {
  std::vector<ProblemCase> cases;
  for (const int64_t dim : {1,  2,  3,  4,  5,  7,  8,  9,  11, 15,  16,  17,  19,
                            31, 32, 33, 48, 64, 65, 72, 80, 96, 128, 192, 256, 512}) {
    for (const int64_t q_len : {2, 8}) {
      ProblemCase c = Base();
      c.q_len = q_len;
      c.head_dim = dim;
      c.value_dim = 0;
      cases.push_back(c);
      c.head_dim = 24;
      c.value_dim = dim;
      c.misaligned = true;
      cases.push_back(c);
    }
  }
  return cases;
}

std::vector<ProblemCase> TypeCases() {
  std::vector<ProblemCase> cases;
  for (const ElementType dtype : kTypes) {
    for (const ElementType output : kTypes) {
      for (const int64_t q_len : {1, 13}) {
        ProblemCase c = Base();
        c.dtype = dtype;
        c.output_dtype = output;
        c.q_len = q_len;
        c.value_dim = 69;
        c.stage = ScoreStage::kProbabilities;
        c.misaligned = q_len == 1;
        cases.push_back(c);
      }
    }
    for (const double logits : {100.0, 1e4}) {
      ProblemCase c = Base();
      c.dtype = dtype;
      c.logit_magnitude = logits;
      cases.push_back(c);
      c.sinks = true;
      c.causal = true;
      cases.push_back(c);
    }
  }
  for (const MaskType mask : kMasks) {
    for (int rank = 1; rank <= 4; ++rank) {
      ProblemCase c = Base();
      c.mask = mask;
      c.mask_rank = rank;
      c.misaligned = rank % 2 == 0;
      cases.push_back(c);
      c.hidden_keys_nan = true;
      c.mask_extent = 50;
      cases.push_back(c);
      c.mask_broadcasts_keys = true;
      cases.push_back(c);
    }
  }
  return cases;
}

std::vector<ProblemCase> OptionCases() {
  std::vector<ProblemCase> cases;
  for (const bool poison : {false, true}) {
    // Queries before, among, at the end of and beyond the keys.
    for (const int64_t at : {-40, -5, 0, 30, 62, 74, 90, 300}) {
      ProblemCase c = Base();
      c.hidden_keys_nan = poison;
      c.first_query_position = at;
      c.causal = true;
      cases.push_back(c);
      c.window_left = 7;
      cases.push_back(c);
      c.causal = false;
      c.window_right = 3;
      cases.push_back(c);
      c.window_left = -1;
      c.alibi = true;
      c.sinks = true;
      cases.push_back(c);
      c.window_left = std::numeric_limits<int64_t>::max();
      c.window_right = std::numeric_limits<int64_t>::max();
      cases.push_back(c);
    }
    for (const Layout layout : {Layout::kHeadsFirst, Layout::kTokensFirst, Layout::kPacked}) {
      ProblemCase c = Base();
      c.hidden_keys_nan = poison;
      c.layout = layout;
      c.batch = 5;
      c.ragged = true;
      cases.push_back(c);
      c.spans = 3;
      c.causal = true;
      c.mask = MaskType::kFloat32;
      cases.push_back(c);
      c.soft_cap = 1.5f;
      c.alibi = true;
      c.sinks = true;
      c.dtype = ElementType::kBFloat16;
      c.output_dtype = ElementType::kBFloat16;
      cases.push_back(c);
    }
  }
  for (const int64_t q_len : {3, 13}) {
    ProblemCase c = Base();
    c.q_len = q_len;
    c.soft_cap = 30;
    c.logit_magnitude = 50;
    cases.push_back(c);
    c.soft_cap = 0;
    c.logit_magnitude = 1;
    c.causal = true;
    c.nan_key = 71;  // rows that see it are NaN, the others are not
    cases.push_back(c);
    c.nan_key = -1;
    c.infinite_value = 71;
    cases.push_back(c);
    c.infinite_value = -1;
    c.window_left = 0;  // one key each
    cases.push_back(c);
  }
  return cases;
}

std::vector<ProblemCase> StageCases() {
  std::vector<ProblemCase> cases;
  for (const ScoreStage stage : {ScoreStage::kScaled, ScoreStage::kSoftCapped, ScoreStage::kMasked,
                                 ScoreStage::kProbabilities}) {
    for (const ElementType output : kTypes) {
      ProblemCase c = Base();
      c.output_dtype = output;
      c.stage = stage;
      cases.push_back(c);
      c.soft_cap = 2;
      c.causal = true;
      c.window_left = 40;
      c.alibi = true;
      c.sinks = true;
      c.mask = MaskType::kBool;
      c.ragged = true;
      c.spans = 2;
      cases.push_back(c);
      c.hidden_keys_nan = true;
      c.misaligned = true;
      cases.push_back(c);
    }
  }
  return cases;
}

}  // namespace attn::reference
