// `two_pass`: attention as plain as it can be while it is right, as the example of
// docs/add-an-implementation.md. One pass over a query's keys for the scores and their maximum, one
// over its values; everything is summed in double precision.
#pragma once

#include "core/attention_implementation.h"

namespace attn {

ImplementationRow TwoPassAttentionRow();

}  // namespace attn
