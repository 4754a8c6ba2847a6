// `sparse`: flash's kernel over the pages of 64 keys that matter. Each task of up to 192 rows keeps
// the first page, the pages around its own rows and, of the others, those that summaries of their
// keys rank highest (kernels/cpu/sparse_selection.h), until the factor or the mass of
// SparsityOptions is reached. A factor of 0 and a mass of 1 are flash, bit for bit. What was left
// out is counted, and the attention that was kept is measured on a sample of rows.
#pragma once

#include "core/attention_implementation.h"

namespace attn {

ImplementationRow SparseAttentionRow();

}  // namespace attn
