// Runs the flash kernel of one instruction set as an executor would, but in an unkind order, one
// task after the other, each in scratch memory that is NaN, exactly as large as planned and guarded
// behind; and takes results apart bit by bit.
#pragma once

#include <cstdint>
#include <ostream>
#include <vector>

#include "kernels/attention_args.h"
#include "kernels/cpu/flash_attention.h"
#include "kernels/cpu/isa.h"

namespace attn::kernels::cpu {
inline void PrintTo(const FlashOptions& cut, std::ostream* out) {
  *out << cut.workers << " workers, at most " << cut.max_rows << " rows a task"
       << (cut.tight ? ", tight" : "");
}
}  // namespace attn::kernels::cpu

namespace attn::reference {

struct FlashOutcome {
  kernels::cpu::FlashPlan plan;
  kernels::cpu::FlashCounters counters;  // of all tasks
};

// A task that writes beyond its scratch memory, or beyond the partial results, is a test failure.
FlashOutcome RunFlash(const kernels::cpu::IsaKernels& isa, const kernels::AttentionArgs& args,
                      const kernels::cpu::FlashOptions& cut = {});

// The plan with its tasks, merges last.
struct FlashTasks {
  kernels::cpu::FlashPlan plan;
  std::vector<kernels::cpu::FlashTask> tasks;
};
FlashTasks PlanFlash(const kernels::AttentionArgs& args, const kernels::cpu::FlashOptions& cut);

// Few and many workers, tasks of few and of many rows, tight or not.
std::vector<kernels::cpu::FlashOptions> FlashCuts();

// The bits of the rows [first, first + count) of a sequence's results, heads [first_head, end_head)
// of each: outputs, then LSEs where they are asked for.
struct ResultRange {
  int64_t sequence = 0;
  int64_t first = 0;
  int64_t count = 0;
  int64_t first_head = 0;
  int64_t end_head = 0;
};
std::vector<char> ResultBits(const kernels::AttentionArgs& args, const ResultRange& range);
std::vector<char> ResultBits(const kernels::AttentionArgs& args);  // of all sequences

// Overwrites all results with a NaN that no kernel makes: what is not written again shows.
void PoisonResults(const kernels::AttentionArgs& args);

// Runs every cut of the problem and expects the bits of the first one. Leaves its results, which a
// caller compares with the reference; returns the outcome of the first cut, whose counters all cuts
// must have.
FlashOutcome ExpectSameBitsForAllCuts(const kernels::cpu::IsaKernels& isa,
                                      const kernels::AttentionArgs& args);

// All compiled instruction sets that run here.
std::vector<const kernels::cpu::IsaKernels*> FlashIsas();

}  // namespace attn::reference
