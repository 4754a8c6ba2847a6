#include "core/manager_pool.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
absl::StatusOr<std::shared_ptr<ManagerPool>> ManagerPool::Create(
    std::shared_ptr<const HostedModel> model, const std::string& implementation,
    const std::vector<DeviceSlot>& devices, ImplementationTable table) {
  auto pool = std::shared_ptr<ManagerPool>(new ManagerPool);
  pool->model_ = std::move(model);
  pool->table_ = table;
  std::size_t instances = devices.size();
  if (pool->model_ != nullptr) {
    pool->name_ = pool->model_->spec().name;
    const std::uint32_t wanted = pool->model_->spec().instances;
    if (wanted > devices.size()) {
      return InvalidField("spec.instances",
                          absl::StrCat("spec.instances is ", wanted, ", but there are ",
                                       devices.size(), " devices"));
    }
    if (wanted > 0) instances = wanted;
  }
  auto active = std::make_shared<Active>();
  active->reason = "the server's default";
  if (!implementation.empty() && implementation != kAutoImplementation) {
    ATTN_ASSIGN_OR_RETURN(active->row, RequireImplementation(table, implementation));
    ATTN_RETURN_IF_ERROR(pool->CanServe(*active->row));
    active->reason = "named in the model's spec";
  }
  pool->active_ = std::move(active);
  for (std::size_t i = 0; i < instances; ++i) {
    pool->managers_.push_back(std::make_unique<AttentionManager>(
        *devices[i].device, *devices[i].workspace, table, devices[i].selector));
  }
  return pool;
}

std::shared_ptr<const Active> ManagerPool::active() const {
  std::lock_guard lock(active_mutex_);
  return active_;
}

absl::Status ManagerPool::CanServe(const ImplementationRow& row) const {
  if (model_ == nullptr) return absl::OkStatus();
  for (const HostedLayer* layer : model_->Layers()) {
    ATTN_RETURN_IF_ERROR(row.supports(PlainShape(*layer)));
  }
  return absl::OkStatus();
}

absl::StatusOr<SwitchOutcome> ManagerPool::SwitchAttention(const std::string& implementation) {
  auto next = std::make_shared<Active>();
  next->reason = "switched to on request";
  absl::Status can_serve;
  if (implementation != kAutoImplementation) {
    ATTN_ASSIGN_OR_RETURN(next->row, RequireImplementation(table_, implementation));
    can_serve = CanServe(*next->row);
  }
  std::lock_guard lock(active_mutex_);
  SwitchOutcome outcome;
  outcome.previous = outcome.active = active_->name();
  if (!can_serve.ok()) {
    outcome.reason =
        absl::StrCat(implementation, " can't serve the model: ", std::string(can_serve.message()));
    return outcome;
  }
  outcome.switched = true;
  outcome.active = next->name();
  if (outcome.active == outcome.previous) {
    outcome.reason = absl::StrCat(implementation, " was active already");
    return outcome;
  }
  outcome.reason = next->reason;
  active_ = std::move(next);
  switches_.fetch_add(1, std::memory_order_relaxed);
  return outcome;
}

AttentionManager& ManagerPool::PickManager() {
  const auto load = [](const std::unique_ptr<AttentionManager>& manager) {
    return manager->queued.load(std::memory_order_relaxed) +
           manager->executing.load(std::memory_order_relaxed);
  };
  return **std::min_element(managers_.begin(), managers_.end(),
                            [&](const auto& a, const auto& b) { return load(a) < load(b); });
}

}  // namespace attn
