// What Python's ctypes calls. Requests and replies are JSON objects, so that the two sides need
// agree on names alone; what is timed is timed inside.
//
//   {"op": "describe"} -> {"model", "isa", "threads", "memory_bytes", "features", "loops",
//                          "implementations": [{"name", "exact", "memory", "compute"}]}
//   {"op": "make", "slot", "shape": {the fields of ProblemSpec}, "query", "key", "value"} -> {}
//       Addresses of contiguous tensors, which are copied.
//   {"op": "run", "slot", "implementation", "options": {}, "repeats", "min_seconds"} ->
//       {"seconds": [...], "workspace_bytes", "workspace_formula_bytes", "packed_input_bytes",
//        "flops"}
//       One untimed execution, then at least `repeats`, and more until they took `min_seconds`.
//       With "warm": false the untimed one is left out.
//       With options "factor" or "mass" also {"sparsity", "audited_mass"}.
//   {"op": "recovery", "slot", "options", "samples"} ->
//       {"recovered_mass", "oracle_mass", "of_oracle", "recovery_rows"} (bench/recovery.h)
//   {"op": "select", "slot"} -> {"implementation", "reason", "cached_seconds", "candidates"}
//       What the selector takes for the problem, how long a cached answer takes (median), and all
//       candidates with their estimates.
//   {"op": "learn", "slot", "implementation", "seconds"} -> {}
//       A timing that corrects the selector's estimates from here on.
//   {"op": "output", "slot", "to": address, "bytes"} -> {}
//   {"op": "release", "slot"} -> {}
//   {"op": "limit", "which": "float32" | "bfloat16" | "read", "seconds"} -> {"per_second"}
//   {"op": "long_document", "shape", "seed", "query", "key", "value"} -> {}
//       Fills tensors of float32 at these addresses (bench/long_document.h).
//
// Anything that fails replies {"error": text, "unsupported": whether it was refused}.
#pragma once

#include <stdint.h>

extern "C" {

// An executor of `threads` threads and scratch memory of `workspace_limit` bytes. Null where that
// can't be had.
void* attn_bench_open(int threads, uint64_t workspace_limit);
void attn_bench_close(void* bench);

// The reply is valid until the next call with the same `bench`. One thread at a time.
const char* attn_bench_call(void* bench, const char* request);
}
