// The implementations that come with the server, and one of this folder's.
#pragma once

#include "core/attention_implementation.h"

namespace attn {

ImplementationTable ExtendedImplementations();

}  // namespace attn
