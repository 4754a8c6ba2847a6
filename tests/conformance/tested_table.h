// The table of implementations that the conformance tests go over. It is given at link time, so
// that an implementation that lives elsewhere is held to the same tests: tests/extension.
#pragma once

#include "core/attention_implementation.h"

namespace attn {

ImplementationTable TestedImplementations();

}  // namespace attn
