#include "tests/conformance/tested_table.h"

#include "tests/extension/extended_table.h"

namespace attn {

ImplementationTable TestedImplementations() { return ExtendedImplementations(); }

}  // namespace attn
