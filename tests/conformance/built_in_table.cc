#include "tests/conformance/tested_table.h"

namespace attn {

ImplementationTable TestedImplementations() { return BuiltInImplementations(); }

}  // namespace attn
