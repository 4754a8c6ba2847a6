#include "core/host_memory.h"

#include <sys/mman.h>

#include <cstdlib>

#include "core/error.h"

namespace attn {
namespace {

constexpr std::size_t kAlignment = 64;
// From here on huge pages are asked for: fewer faults on first touch, fewer TLB misses.
constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

}  // namespace

absl::StatusOr<Buffer> AllocateHostMemory(std::size_t bytes) {
  if (bytes == 0) return Buffer{};
  const bool huge = bytes >= kHugePageBytes;
  const std::size_t alignment = huge ? kHugePageBytes : kAlignment;
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* const data = rounded < bytes ? nullptr : std::aligned_alloc(alignment, rounded);
  if (data == nullptr) return OutOfMemory();
  // Advice: where it is not taken nothing changes.
  if (huge) madvise(data, rounded, MADV_HUGEPAGE);
  return Buffer{std::shared_ptr<void>(data, &std::free), bytes};
}

}  // namespace attn
