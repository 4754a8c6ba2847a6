// A status as the API's Error message, which a stream carries as an answer and a unary rpc as
// trailing metadata.
#pragma once

#include "absl/status/status.h"
#include "attention/v1/attention.pb.h"

namespace attn::server {

// Texts and details are cut where they quote more of a caller's bytes than metadata may hold.
attention::v1::Error ToErrorMessage(const absl::Status& status);

}  // namespace attn::server
