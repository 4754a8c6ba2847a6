// All models that the server hosts, by name, and the pool for attention without a model.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "core/manager_pool.h"
#include "core/measured_timings.h"

namespace attn {

class ModelRegistry {
 public:
  // The table and the devices outlive the registry.
  ModelRegistry(ImplementationTable table, std::vector<DeviceSlot> devices);

  // Builds and publishes a model; slow, requests go on meanwhile. ALREADY_EXISTS for a name in use
  // or being loaded. `model_root` as LoadOptions says.
  absl::StatusOr<std::shared_ptr<ManagerPool>> Load(const ModelSpec& spec,
                                                    const std::string& model_root);

  // Running requests keep the model; later ones get NOT_FOUND.
  absl::Status Unload(const std::string& name);

  // The model's pool; with an empty name the one for attention without a model. NOT_FOUND.
  absl::StatusOr<std::shared_ptr<ManagerPool>> Find(const std::string& name) const;

  std::vector<std::shared_ptr<ManagerPool>> List() const;  // by name; without the nameless one

  ImplementationTable table() const { return table_; }

  // What benchmarks measured: the selector goes by it.
  MeasuredTimings& timings() { return timings_; }

 private:
  const ImplementationTable table_;
  const std::vector<DeviceSlot> devices_;
  const std::shared_ptr<ManagerPool> nameless_;
  MeasuredTimings timings_;

  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<ManagerPool>> models_;
  std::set<std::string> loading_;
};

}  // namespace attn
