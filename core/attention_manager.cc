#include "core/attention_manager.h"

#include "core/error.h"

namespace attn {

const std::string& Active::name() const {
  static const std::string automatic = kAutoImplementation;
  return row == nullptr ? automatic : row->name;
}

AttentionManager::AttentionManager(Device& device, Workspace& workspace, ImplementationTable table,
                                   const Selector* selector)
    : device_(device), workspace_(workspace), table_(table), selector_(selector) {
  for (const ImplementationRow& row : table_) implementations_.push_back(row.create());
}

absl::StatusOr<Choice> AttentionManager::SelectAttentionModule(const SelectionRequest& request,
                                                               const AttentionShape& shape) const {
  ATTN_ASSIGN_OR_RETURN(Selection selection, selector_ == nullptr
                                                 ? SelectImplementation(table_, request, shape)
                                                 : selector_->Select(request, shape));
  const auto index = static_cast<std::size_t>(selection.row - table_.data());
  return Choice{std::move(selection), implementations_[index]};
}

}  // namespace attn
