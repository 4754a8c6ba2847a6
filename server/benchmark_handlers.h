// BenchmarkAttention without a wire: a benchmark on a thread of its own, whose executions wait in
// the device's queue behind all requests.
#pragma once

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "core/timings_file.h"
#include "server/benchmark_codec.h"
#include "server/call_context.h"
#include "server/server_state.h"

namespace attn::server {

// Progress, at most every 50 ms, then a result per implementation, then progress of 1, through
// `context->send`. `done` is called exactly once, on this or another thread. One benchmark runs at
// a time: RESOURCE_EXHAUSTED (reason BENCHMARK_RUNNING) for others.
void HandleBenchmarkAttention(ServerState& state, BenchmarkCall call,
                              std::shared_ptr<CallContext> context,
                              std::function<void(absl::Status)> done);

// What the timings file of this server holds for.
TimingsKey TimingsKeyOf(const ServerState& state);

}  // namespace attn::server
