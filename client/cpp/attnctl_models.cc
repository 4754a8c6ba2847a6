// models, model load, model unload, switch.
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/io/zero_copy_stream_impl.h>
#include <google/protobuf/text_format.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/cpp/attnctl.h"
#include "client/cpp/table.h"
#include "client/cpp/tensors.h"

namespace attn::client {
namespace {

namespace v1 = attention::v1;

uint64_t LayerCount(const v1::ModelSpec& spec) {
  uint64_t count = 0;
  const auto add = [&count](const auto& layers) {
    for (const v1::LayerSpec& layer : layers) count += layer.repeat() == 0 ? 1 : layer.repeat();
  };
  for (const v1::LayerStack& stack : spec.stacks()) {
    add(stack.self_attention());
    add(stack.cross_attention());
  }
  return count;
}

std::string Devices(const v1::ModelStatus& model) {
  return absl::StrJoin(model.managers(), ",",
                       [](std::string* out, const v1::ManagerStatus& manager) {
                         absl::StrAppend(out, manager.device());
                       });
}

absl::Status PrintModels(const google::protobuf::RepeatedPtrField<v1::ModelStatus>& models) {
  if (models.empty()) return Print("no models: attention alone is served (attnctl attend)");
  Table table({"MODEL", "MODALITY", "LAYERS", "DTYPE", "IMPLEMENTATION", "DEVICES", "REQUESTS",
               "SWITCHES", "SESSIONS", "CACHE", "WEIGHTS", "WHY"});
  for (const v1::ModelStatus& model : models) {
    table.AddRow({model.spec().name(),
                  EnumText(v1::Modality_Name(model.spec().modality()), "MODALITY_"),
                  absl::StrCat(LayerCount(model.spec())), DataTypeName(model.spec().dtype()),
                  OrDash(model.active_implementation()), OrDash(Devices(model)),
                  absl::StrCat(model.requests()), absl::StrCat(model.switches()),
                  absl::StrCat(model.sessions()), BytesText(model.cache_bytes()),
                  BytesText(model.weight_bytes()), OrDash(model.reason())});
  }
  return Print(table.Render());
}

absl::Status RunModels(Client& client, const CommandLine& line) {
  const auto response = client.ListModels();
  if (!response.ok()) return response.status();
  return line.json ? PrintJson(*response) : PrintModels(response->models());
}

struct LoadArguments {
  std::string name, directory, dtype, implementation, spec_file;
};

class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int row, int column, const std::string& message) override {
    if (text.empty()) text = absl::StrCat(row + 1, ":", column + 1, ": ", message);
  }
  std::string text;
};

absl::Status ReadSpec(const std::string& path, v1::ModelSpec& spec) {
  std::ifstream in(path);
  if (!in) return UsageError(absl::StrCat(path, " cannot be read"));
  google::protobuf::io::IstreamInputStream stream(&in);
  google::protobuf::TextFormat::Parser parser;
  FirstError error;
  parser.RecordErrorsTo(&error);
  if (parser.Parse(&stream, &spec)) return absl::OkStatus();
  return UsageError(
      absl::StrCat(path, ":", error.text, " (an attention.v1.ModelSpec in text format)"));
}

absl::Status RunLoad(Client& client, const CommandLine& line, const LoadArguments& arguments) {
  v1::LoadModelRequest request;
  v1::ModelSpec& spec = *request.mutable_spec();
  if (arguments.directory.empty() && arguments.spec_file.empty()) {
    return UsageError("give a DIRECTORY under the server's model root, or --spec FILE, or both");
  }
  if (!arguments.spec_file.empty()) {
    if (absl::Status status = ReadSpec(arguments.spec_file, spec); !status.ok()) return status;
  }
  spec.set_name(arguments.name);
  if (!arguments.directory.empty()) spec.set_weights(arguments.directory);
  if (!arguments.implementation.empty()) spec.set_implementation(arguments.implementation);
  if (!arguments.dtype.empty()) spec.set_dtype(*DataTypeFromName(arguments.dtype));
  const auto response = client.LoadModel(request);
  if (!response.ok()) return response.status();
  if (line.json) return PrintJson(*response);
  v1::ListModelsResponse loaded;
  *loaded.add_models() = response->model();
  return PrintModels(loaded.models());
}

absl::Status RunUnload(Client& client, const CommandLine& line,
                       const v1::UnloadModelRequest& request) {
  const auto response = client.UnloadModel(request);
  if (!response.ok()) return response.status();
  return line.json ? PrintJson(*response) : Print(absl::StrCat("unloaded ", request.model()));
}

absl::Status RunSwitch(Client& client, const CommandLine& line,
                       const v1::SwitchAttentionRequest& request) {
  const auto response = client.SwitchAttention(request);
  if (!response.ok()) return response.status();
  const std::string what = request.model().empty() ? "attention without a model" : request.model();
  if (line.json) {
    if (absl::Status status = PrintJson(*response); !status.ok()) return status;
  }
  // The rpc succeeds; a script that asked for a switch must see that there was none.
  if (!response->switched()) {
    return absl::FailedPreconditionError(
        absl::StrCat(what, " stays on ", response->active(), ": ", response->reason()));
  }
  if (line.json) return absl::OkStatus();
  const std::string why =
      response->reason().empty() ? "" : absl::StrCat(" (", response->reason(), ")");
  return Print(absl::StrCat(what, ": ", response->previous(), " -> ", response->active(), why));
}

void AddLoad(CLI::App& model, CommandLine& line) {
  CLI::App* load = model.add_subcommand("load", "Load a model, or one's attention without weights");
  auto arguments = std::make_shared<LoadArguments>();
  load->add_option("NAME", arguments->name, "What requests will call it")
      ->type_name("")
      ->required();
  load->add_option("DIRECTORY", arguments->directory,
                   "Under the server's model root, with config.json and *.safetensors")
      ->type_name("");
  load->add_option("--dtype", arguments->dtype, "Of weights and projections (default: as stored)")
      ->check(CLI::IsMember({"float32", "float16", "bfloat16"}));
  load->add_option("--implementation", arguments->implementation,
                   "At start: a name from 'attnctl implementations' (default: auto)");
  load->add_option("--spec", arguments->spec_file,
                   "A ModelSpec in protobuf's text format; the arguments above go over it")
      ->type_name("FILE");
  load->callback([arguments, &line] {
    line.run = [arguments, &line](Client& client) { return RunLoad(client, line, *arguments); };
  });
}

void AddUnload(CLI::App& model, CommandLine& line) {
  CLI::App* unload = model.add_subcommand("unload", "Unload a model; running requests finish");
  auto name = std::make_shared<std::string>();
  auto close_sessions = std::make_shared<bool>(false);
  unload->add_option("NAME", *name, "A name from 'attnctl models'")->type_name("")->required();
  unload->add_flag("--close-sessions", *close_sessions,
                   "End its open sessions; otherwise they prevent it");
  unload->callback([name, close_sessions, &line] {
    line.run = [name, close_sessions, &line](Client& client) {
      v1::UnloadModelRequest request;
      request.set_model(*name);
      request.set_close_sessions(*close_sessions);
      return RunUnload(client, line, request);
    };
  });
}

void AddSwitch(CLI::App& app, CommandLine& line) {
  CLI::App* command = app.add_subcommand(
      "switch", "Make an implementation a model's active one, at once and under load");
  auto model = std::make_shared<std::string>();
  auto implementation = std::make_shared<std::string>();
  command->add_option("MODEL", *model, "A model's name; - for attention without a model")
      ->required();
  command
      ->add_option("IMPLEMENTATION", *implementation,
                   "A name from 'attnctl implementations', or auto")
      ->type_name("")
      ->required();
  command->callback([model, implementation, &line] {
    line.run = [model, implementation, &line](Client& client) {
      v1::SwitchAttentionRequest request;
      if (*model != "-") request.set_model(*model);
      request.set_implementation(*implementation);
      return RunSwitch(client, line, request);
    };
  });
}

}  // namespace

void AddModelCommands(CLI::App& app, CommandLine& line) {
  CLI::App* models = app.add_subcommand("models", "List the models, and what serves them");
  models->callback(
      [&line] { line.run = [&line](Client& client) { return RunModels(client, line); }; });
  CLI::App* model = app.add_subcommand("model", "Load or unload a model");
  model->require_subcommand(1);
  AddLoad(*model, line);
  AddUnload(*model, line);
  AddSwitch(app, line);
}

}  // namespace attn::client
