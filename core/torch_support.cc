#include "core/torch_support.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/InferenceMode.h>

#include <memory>
#include <mutex>
#include <new>

#include "core/error.h"
#include "core/torch_threads.h"

namespace attn {
namespace {

thread_local MemoryMeter* active_meter = nullptr;

// Lies before each block, so that its release is taken off the meter that counted it. A meter is
// only touched by the thread that counts on it; a block that another thread frees stays on the
// count until the next Reset.
struct alignas(c10::gAlignment) BlockHeader {
  MemoryMeter* meter = nullptr;  // null: not counted
  std::size_t bytes = 0;
  c10::DataPtr inner;  // header and block
};

void ReleaseBlock(void* block) {
  if (block == nullptr) return;
  auto* const header = static_cast<BlockHeader*>(block) - 1;
  if (header->meter != nullptr && header->meter == active_meter) {
    header->meter->Remove(header->bytes);
  }
  const c10::DataPtr inner = std::move(header->inner);
  header->~BlockHeader();
}

// Thrown into LibTorch, caught in RunTorch.
struct LimitExceeded : std::bad_alloc {
  explicit LimitExceeded(std::size_t needed) : bytes(needed) {}
  std::size_t bytes;
};

// LibTorch's own allocator, with a count and a limit beside it.
class CountingAllocator final : public c10::Allocator {
 public:
  explicit CountingAllocator(c10::Allocator* inner) : inner_(inner) {}

  c10::DataPtr allocate(std::size_t bytes) override {
    if (bytes == 0) return inner_->allocate(0);
    if (active_meter != nullptr && !active_meter->Allows(bytes)) throw LimitExceeded(bytes);
    c10::DataPtr inner = AllocateInner(bytes + sizeof(BlockHeader));
    const c10::Device device = inner.device();
    auto* const header = new (inner.get()) BlockHeader{active_meter, bytes, {}};
    header->inner = std::move(inner);
    if (active_meter != nullptr) active_meter->Add(bytes);
    // A block is freed by its address alone: oneDNN's GEMMs ask for that (raw_allocate).
    return {header + 1, header + 1, &ReleaseBlock, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &ReleaseBlock; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    inner_->copy_data(to, from, bytes);
  }

 private:
  c10::DataPtr AllocateInner(std::size_t bytes) {
    try {
      return inner_->allocate(bytes);
    } catch (const c10::Error&) {  // it has no other reason to fail
      throw std::bad_alloc();
    }
  }

  c10::Allocator* const inner_;
};

void InstallCountingAllocator() {
  static std::once_flag once;
  std::call_once(once, [] {
    static CountingAllocator allocator(c10::GetCPUAllocator());
    c10::SetCPUAllocator(&allocator, /*priority=*/1);
  });
}

}  // namespace

void ConfigureTorchThread(int threads) {
  InstallCountingAllocator();
  at::set_num_threads(threads);
}

c10::ScalarType ToScalarType(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return c10::ScalarType::Half;
    case DType::kBFloat16:
      return c10::ScalarType::BFloat16;
    case DType::kInt32:
      return c10::ScalarType::Int;
    case DType::kInt64:
      return c10::ScalarType::Long;
    case DType::kBool:
      return c10::ScalarType::Bool;
    case DType::kInt8:
      return c10::ScalarType::Char;
    case DType::kFloat32:
    case DType::kUnspecified:
      break;
  }
  return c10::ScalarType::Float;
}

at::Tensor AsTensor(const TensorView& view) {
  const auto rank = static_cast<std::size_t>(view.rank);
  return at::from_blob(const_cast<void*>(view.data), c10::IntArrayRef(view.extents.data(), rank),
                       c10::IntArrayRef(view.strides.data(), rank),
                       c10::TensorOptions().dtype(ToScalarType(view.dtype)));
}

AllocationScope::AllocationScope(MemoryMeter& meter) { active_meter = &meter; }
AllocationScope::~AllocationScope() { active_meter = nullptr; }

absl::Status RunTorch(MemoryMeter& meter, const std::function<void()>& body) {
  const AllocationScope scope(meter);
  try {
    const c10::InferenceMode inference;
    body();
    return absl::OkStatus();
  } catch (const LimitExceeded& exceeded) {
    return meter.Refusal(exceeded.bytes);
  } catch (const std::bad_alloc&) {
    return OutOfMemory();
  } catch (const std::exception&) {
    // Its text holds source paths and addresses: not for callers.
    return MakeError(absl::StatusCode::kInternal, "LIBTORCH_FAILED",
                     "LibTorch could not execute this");
  }
}

}  // namespace attn
