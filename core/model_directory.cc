#include "core/model_directory.h"

#include <exception>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/config_reader.h"
#include "core/error.h"
#include "core/families/family.h"
#include "core/json.h"
#include "core/model_files.h"
#include "core/spec_agreement.h"
#include "core/weight_loader.h"

namespace attn {
namespace {

constexpr std::size_t kMaxConfigBytes = std::size_t{16} << 20;

absl::Status RunAtOnce(const std::function<void()>& slice) {
  slice();
  return absl::OkStatus();
}

absl::StatusOr<FamilyModel> ReadConfig(const ModelFiles& files) {
  ATTN_ASSIGN_OR_RETURN(const std::string text, files.Read("config.json", kMaxConfigBytes));
  ATTN_ASSIGN_OR_RETURN(const nlohmann::json document,
                        ParseJsonObject(text, "config.json", "BAD_MODEL_DIRECTORY"));
  ConfigReader config(&document);
  return ReadFamilyModel(config, BuiltinFamilies());
}

struct PlannedStack {
  std::vector<PlannedLayer> self_attention;
  std::vector<PlannedLayer> cross_attention;
};

// The dtype of all stacks together: what the caller asks for, else what the checkpoint has.
DType ChooseDType(DType asked, const std::vector<PlannedStack>& stacks) {
  if (asked != DType::kUnspecified) return asked;
  DType dtype = DType::kUnspecified;
  for (const PlannedStack& stack : stacks) {
    for (const std::vector<PlannedLayer>* layers :
         {&stack.self_attention, &stack.cross_attention}) {
      if (layers->empty()) continue;
      const DType stored = StoredDType(*layers);
      if (dtype != DType::kUnspecified && stored != dtype) return DType::kFloat32;
      dtype = stored;
    }
  }
  return dtype;
}

absl::StatusOr<PlannedStack> PlanStack(const ModelTensors& tensors, const FamilyModel& family,
                                       std::size_t index, LayerStack& stack) {
  PlannedStack plan;
  ATTN_ASSIGN_OR_RETURN(plan.self_attention,
                        PlanSelfAttention(tensors, stack, family.self_attention[index]));
  ReadSinks(plan.self_attention, stack);
  if (stack.cross_attention.empty()) return plan;
  ATTN_ASSIGN_OR_RETURN(plan.cross_attention,
                        PlanCrossAttention(tensors, stack, family.cross_attention[index]));
  return plan;
}

absl::Status LoadLayers(const std::vector<PlannedLayer>& plans, DType dtype,
                        const SliceRunner& run_slice, std::vector<LayerWeights>& layers) {
  for (const PlannedLayer& plan : plans) {
    ATTN_ASSIGN_OR_RETURN(LayerWeights weights, LoadLayer(plan, dtype, run_slice));
    layers.push_back(std::move(weights));
  }
  return absl::OkStatus();
}

absl::StatusOr<LoadedModel> Load(const ModelSpec& spec, const LoadOptions& options) {
  if (spec.dtype != DType::kUnspecified && !IsFloating(spec.dtype)) {
    return InvalidField("dtype", absl::StrCat("dtype is ", DTypeName(spec.dtype),
                                              ", which is not float32, float16 or bfloat16"));
  }
  ATTN_ASSIGN_OR_RETURN(const ModelFiles files,
                        ModelFiles::Resolve(options.model_root, spec.weights));
  ATTN_ASSIGN_OR_RETURN(FamilyModel family, ReadConfig(files));

  LoadedModel model;
  model.spec = spec;
  model.spec.modality = family.modality;
  model.spec.stacks = std::move(family.stacks);

  // All stacks are checked before the first byte is allocated.
  ATTN_ASSIGN_OR_RETURN(const ModelTensors tensors, ModelTensors::Open(files));
  std::vector<PlannedStack> plans;
  for (std::size_t i = 0; i < model.spec.stacks.size(); ++i) {
    ATTN_ASSIGN_OR_RETURN(PlannedStack plan, PlanStack(tensors, family, i, model.spec.stacks[i]));
    plans.push_back(std::move(plan));
  }
  ATTN_RETURN_IF_ERROR(CheckAgreement(spec, model.spec));
  model.spec.dtype = ChooseDType(spec.dtype, plans);

  const SliceRunner run_slice = options.run_slice ? options.run_slice : RunAtOnce;
  for (const PlannedStack& plan : plans) {
    LoadedStack& stack = model.stacks.emplace_back();
    ATTN_RETURN_IF_ERROR(
        LoadLayers(plan.self_attention, model.spec.dtype, run_slice, stack.self_attention));
    ATTN_RETURN_IF_ERROR(
        LoadLayers(plan.cross_attention, model.spec.dtype, run_slice, stack.cross_attention));
  }
  return model;
}

}  // namespace

absl::StatusOr<LoadedModel> LoadModelDirectory(const ModelSpec& spec,
                                               const LoadOptions& options) try {
  return Load(spec, options);
} catch (const std::bad_alloc&) {
  return OutOfMemory();
} catch (const std::exception&) {
  return MakeError(absl::StatusCode::kInternal, "LOAD_FAILED",
                   "an unexpected exception while loading the model's directory");
}

}  // namespace attn
