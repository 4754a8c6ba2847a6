#include "tests/extension/extended_table.h"

#include <vector>

#include "tests/extension/two_pass_attention.h"

namespace attn {

ImplementationTable ExtendedImplementations() {
  static const std::vector<ImplementationRow> rows = [] {
    const ImplementationTable built_in = BuiltInImplementations();
    std::vector<ImplementationRow> all(built_in.begin(), built_in.end());
    all.push_back(TwoPassAttentionRow());
    return all;
  }();
  return rows;
}

}  // namespace attn
