// What is known of a class of hardware before anything is measured on a machine of it, as data: its
// rates, how well each implementation uses them, and from when on a choice is worth making. A new
// class is a row of the table in hardware_profiles.cc.
#pragma once

#include <cstdint>
#include <string>

#include "absl/types/span.h"
#include "core/dtype.h"
#include "core/hardware.h"

namespace attn {

// A number for each dtype of an execution's operands.
struct PerDType {
  double float32 = 0.0;
  double float16 = 0.0;
  double bfloat16 = 0.0;
  double int8 = 0.0;  // keys and values; queries beside them have another

  double Of(DType dtype) const;
};

// How one implementation uses the hardware. Its time is the sum of these parts; what is shared by
// the units that have work (cores, multiprocessors) is divided by their number.
struct ImplementationCosts {
  const char* name;             // empty: of implementations that the profile does not know
  double call_seconds;          // of an execution, whatever its size
  double head_seconds;          // of each sequence's query head
  PerDType share;               // of peak that its products reach, by the dtype of the keys
  double key_passes;            // times that memory is passed over with plain keys and values
  double query_passes;          // the same for queries and output
  double page_passes;           // the same for those in a cache's pages
  double score_passes;          // the same for the scores, in float32
  double position_mask_passes;  // the same for a byte per pair where position hides keys, and
                                // the queries do not begin with the first key
  bool divides_heads;           // one head's work keeps several units busy
};

struct HardwareProfile {
  const char* name;               // "cpu/avx2", "cuda/sm80"
  const char* backend;            // "cpu", "cuda": held against the rows' traits
  PerDType operations_per_cycle;  // of one unit: twice its multiply-adds
  double clock_hz;
  double bytes_per_second;  // of the device's memory, all units together
  // The first of the table's rows within this factor of the fastest estimate is taken: between
  // equals the choice is steady, and so are a sequence's bits.
  double steady_factor;
  // Scratch memory that is taken to be there without asking for what is free.
  std::uint64_t unasked_bytes;
  absl::Span<const ImplementationCosts> costs;  // the last one is of unknown implementations

  const ImplementationCosts& CostsOf(const std::string& implementation) const;
};

// All of them, each backend's from the most capable to the one that fits everything.
absl::Span<const HardwareProfile> HardwareProfiles();

// That of kernels for the instruction set `isa` (CpuHardware::active).
const HardwareProfile& ProfileOfCpu(const std::string& isa);

// By compute capability and tensor cores.
const HardwareProfile& ProfileOfGpu(const GpuHardware& gpu);

}  // namespace attn
