// All models that the server hosts, by name, and the pool for attention without a model.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "core/hardware.h"
#include "core/manager_pool.h"
#include "core/measured_timings.h"

namespace attn {

class ModelRegistry {
 public:
  // The table and the devices outlive the registry. Each device gets a selector, for the hardware
  // that `hardware` describes.
  ModelRegistry(ImplementationTable table, std::vector<DeviceSlot> devices,
                std::shared_ptr<const HardwareSource> hardware = SystemHardware());

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

  // What was measured on this machine; selectors use it.
  MeasuredTimings& timings() { return timings_; }

  // Posts a job to each device that measures its limits for its selector: about 30 ms. The registry
  // outlives the jobs.
  void MeasureDevices();

 private:
  std::vector<DeviceSlot> WithSelectors(std::vector<DeviceSlot> devices,
                                        std::shared_ptr<const HardwareSource> hardware);

  const ImplementationTable table_;
  MeasuredTimings timings_;
  std::vector<std::unique_ptr<Selector>> selectors_;  // parallel to devices_
  const std::vector<DeviceSlot> devices_;
  const std::shared_ptr<ManagerPool> nameless_;

  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<ManagerPool>> models_;
  std::set<std::string> loading_;
};

}  // namespace attn
