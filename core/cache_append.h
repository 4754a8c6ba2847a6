// New tokens on their way into a cache: from a problem's rows into the pages that its call
// reserved.
#pragma once

#include "absl/status/status.h"
#include "core/attention_problem.h"
#include "core/cache_call.h"
#include "core/executor.h"

namespace attn {

// Blocks for what `problem` adds to its rows, whose pages it is bound to. RESOURCE_EXHAUSTED.
absl::Status ReserveCache(AttentionProblem& problem, CacheCall& call);

// Writes the problem's new tokens into the pages, rounded to the cache's dtype. After ReserveCache,
// on the executor's driver, when the problem's keys and values are there.
void AppendToCache(const AttentionProblem& problem, const CacheCall& call, Executor& executor);

}  // namespace attn
