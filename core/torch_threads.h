// LibTorch's thread settings, without its headers.
#pragma once

namespace attn {

// Sets how many threads LibTorch's regions use when the calling thread opens them (the setting is
// per host thread), and installs the allocator hook. First thing on an executor's driver.
void ConfigureTorchThread(int threads);

}  // namespace attn
