// Looks at a message's bytes before protobuf does: a parsed message can be many times larger than
// its bytes (an empty repeated entry costs 28 bytes and more), so its fields and packed values are
// counted first.
#pragma once

#include <google/protobuf/descriptor.h>
#include <google/protobuf/io/zero_copy_stream.h>

#include <cstdint>

#include "absl/status/status.h"

namespace attn::server {

struct WireLimits {
  std::int64_t max_entries = 262144;  // fields and packed values, nested ones included
  int max_depth = 16;
};

// INVALID_ARGUMENT (reason MALFORMED_MESSAGE or TOO_MANY_ENTRIES). Bytes of tensors are skipped,
// not read.
absl::Status CheckWire(google::protobuf::io::ZeroCopyInputStream& bytes,
                       const google::protobuf::Descriptor& type, const WireLimits& limits);

}  // namespace attn::server
