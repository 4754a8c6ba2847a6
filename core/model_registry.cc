#include "core/model_registry.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

constexpr std::size_t kMaxNameBytes = 128;
constexpr std::size_t kMaxModels = 256;

// Names become metric labels and command-line arguments.
absl::Status CheckName(const std::string& name) {
  bool plain = !name.empty() && name.size() <= kMaxNameBytes;
  for (char c : name) {
    plain = plain && (absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' ||
                      c == '.' || c == '/' || c == ':');
  }
  if (plain) return absl::OkStatus();
  return InvalidField("spec.name", absl::StrCat("spec.name must have 1 to ", kMaxNameBytes,
                                                " characters out of letters, digits and -_./:"));
}

absl::Status NotFound(const std::string& name) {
  return MakeError(absl::StatusCode::kNotFound, "MODEL_NOT_FOUND",
                   absl::StrCat("there is no model '", name, "'"), {{"field", "model"}});
}

}  // namespace

ModelRegistry::ModelRegistry(ImplementationTable table, std::vector<DeviceSlot> devices,
                             std::shared_ptr<const HardwareSource> hardware)
    : table_(table),
      devices_(WithSelectors(std::move(devices), std::move(hardware))),
      nameless_(ManagerPool::Create(nullptr, "", devices_, table_).value()) {}

// Devices are CPUs.
std::vector<DeviceSlot> ModelRegistry::WithSelectors(
    std::vector<DeviceSlot> devices, std::shared_ptr<const HardwareSource> hardware) {
  for (DeviceSlot& slot : devices) {
    SelectorOptions options;
    options.profile = &ProfileOfCpu(hardware->ActiveIsa());
    options.units = slot.device->executor().threads();
    options.workspace_limit = slot.workspace->meter().limit();
    options.available_bytes = [hardware] { return hardware->AvailableBytes(); };
    options.timings = &timings_;
    selectors_.push_back(std::make_unique<Selector>(table_, std::move(options)));
    slot.selector = selectors_.back().get();
  }
  return devices;
}

void ModelRegistry::MeasureDevices() {
  for (std::size_t i = 0; i < devices_.size(); ++i) {
    Device* const device = devices_[i].device;
    device->executor().Post(
        [device, selector = selectors_[i].get()] { selector->SetPeaks(MeasurePeaks(*device)); });
  }
}

absl::StatusOr<std::shared_ptr<ManagerPool>> ModelRegistry::Load(const ModelSpec& spec,
                                                                 const std::string& model_root) {
  ATTN_RETURN_IF_ERROR(CheckName(spec.name));
  {
    std::lock_guard lock(mutex_);
    if (models_.size() + loading_.size() >= kMaxModels) {
      return MakeError(absl::StatusCode::kResourceExhausted, "TOO_MANY_MODELS",
                       absl::StrCat("the server hosts ", kMaxModels, " models already"));
    }
    if (models_.count(spec.name) != 0 || !loading_.insert(spec.name).second) {
      return MakeError(absl::StatusCode::kAlreadyExists, "MODEL_EXISTS",
                       absl::StrCat("there is a model '", spec.name, "' already"),
                       {{"field", "spec.name"}});
    }
  }
  const auto build = [&]() -> absl::StatusOr<std::shared_ptr<ManagerPool>> {
    LoadOptions options;
    options.model_root = model_root;
    // Slices are jobs of the first device's executor: between two of them waiting requests have
    // their turn.
    options.run_slice = [this](const std::function<void()>& slice) {
      devices_.front().device->executor().Run(slice);
      return absl::OkStatus();
    };
    ATTN_ASSIGN_OR_RETURN(std::shared_ptr<const HostedModel> model,
                          HostedModel::Create(spec, options));
    return ManagerPool::Create(std::move(model), spec.implementation, devices_, table_);
  };
  absl::StatusOr<std::shared_ptr<ManagerPool>> pool = GuardMemory(build);
  std::lock_guard lock(mutex_);
  loading_.erase(spec.name);
  if (pool.ok()) models_[spec.name] = *pool;
  return pool;
}

absl::Status ModelRegistry::Unload(const std::string& name) {
  std::shared_ptr<ManagerPool> last;  // its parameters are freed outside the lock
  std::lock_guard lock(mutex_);
  const auto found = models_.find(name);
  if (found == models_.end()) return NotFound(name);
  last = std::move(found->second);
  models_.erase(found);
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<ManagerPool>> ModelRegistry::Find(const std::string& name) const {
  if (name.empty()) return nameless_;
  std::lock_guard lock(mutex_);
  const auto found = models_.find(name);
  if (found == models_.end()) return NotFound(name);
  return found->second;
}

std::vector<std::shared_ptr<ManagerPool>> ModelRegistry::List() const {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<ManagerPool>> pools;
  for (const auto& [name, pool] : models_) pools.push_back(pool);
  return pools;
}

}  // namespace attn
