// An attention problem whose keys and values lie in pages of a cache, as random appends left them:
// everything in the pages that is not a token a query may see is NaN.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "tests/reference/problem_builder.h"

namespace attn::reference {

class PagedProblem {
 public:
  // `c` with its keys and values rounded to `cache_dtype`, or quantised to int8. With `let_go`,
  // tokens that no query sees by position were let go: their blocks are null, and what is left of
  // them is NaN.
  PagedProblem(const ProblemCase& c, kernels::ElementType cache_dtype, bool let_go);
  ~PagedProblem();
  PagedProblem(const PagedProblem&) = delete;
  PagedProblem& operator=(const PagedProblem&) = delete;

  const kernels::AttentionArgs& args() const { return paged_; }
  // The same problem on rows that hold what the pages should hold (zeros for what was let go; what
  // int8 stands for, in float32), with the same outputs: for the reference.
  const kernels::AttentionArgs& rows() const { return dense_; }
  // The problem before its keys and values were rounded.
  const kernels::AttentionArgs& original() const { return problem_.args(); }
  std::int64_t tokens_let_go() const { return tokens_let_go_; }
  bool NothingElseWritten() const { return problem_.NothingElseWritten(); }

 private:
  struct Row;
  void MakeRow(const kernels::Sequence& sequence, bool let_go, std::uint32_t seed);
  void FillRows(const kernels::Sequence& sequence, Row& row) const;
  void FillPages(const kernels::Sequence& sequence, Row& row, std::uint32_t seed) const;

  AttentionProblem problem_;
  kernels::AttentionArgs paged_;
  kernels::AttentionArgs dense_;
  std::vector<std::unique_ptr<Row>> rows_;
  std::vector<kernels::Sequence> paged_sequences_;
  std::vector<kernels::Sequence> dense_sequences_;
  std::int64_t tokens_let_go_ = 0;
};

}  // namespace attn::reference
