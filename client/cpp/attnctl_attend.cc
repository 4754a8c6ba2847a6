// attend: attention on .npy files.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/cpp/attnctl.h"
#include "client/cpp/npy.h"
#include "client/cpp/table.h"
#include "client/cpp/tensors.h"

namespace attn::client {
namespace {

namespace v1 = attention::v1;

struct AttendArguments {
  std::string query, key, value, mask;      // files
  std::string output, weights, lse;         // files to write; empty: not asked for
  std::string layout, dtype, output_dtype;  // names; empty: the API's default
  std::string implementation, model, stack;
  uint32_t layer = 0;
  bool causal = false;
  std::optional<int64_t> window_left, window_right;
  std::optional<double> scale, soft_cap;
  std::vector<int64_t> query_lengths, kv_lengths;
};

const std::map<std::string, v1::TensorLayout>& Layouts() {
  static const auto& layouts =
      *new std::map<std::string, v1::TensorLayout>{{"heads_first", v1::TENSOR_LAYOUT_HEADS_FIRST},
                                                   {"tokens_first", v1::TENSOR_LAYOUT_TOKENS_FIRST},
                                                   {"packed", v1::TENSOR_LAYOUT_PACKED}};
  return layouts;
}

// `dtype` empty: as the file has it.
absl::Status LoadTensor(const std::string& path, const std::string& dtype, v1::Tensor& tensor) {
  absl::StatusOr<NpyFile> file = ReadNpy(path);
  if (!file.ok()) return file.status();
  if (!file->note.empty()) std::fprintf(stderr, "attnctl: note: %s\n", file->note.c_str());
  if (dtype.empty()) {
    tensor = std::move(file->tensor);
    return absl::OkStatus();
  }
  absl::StatusOr<v1::Tensor> converted = ConvertFloating(file->tensor, *DataTypeFromName(dtype));
  if (!converted.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", std::string(converted.status().message())));
  }
  tensor = *std::move(converted);
  return absl::OkStatus();
}

absl::Status LoadTensors(const AttendArguments& arguments, v1::AttendRequest& request) {
  const std::pair<const std::string*, v1::Tensor*> inputs[] = {
      {&arguments.query, request.mutable_query()},
      {&arguments.key, request.mutable_key()},
      {&arguments.value, request.mutable_value()}};
  for (const auto& [path, tensor] : inputs) {
    absl::Status status = LoadTensor(*path, arguments.dtype, *tensor);
    if (!status.ok()) return status;
  }
  if (arguments.mask.empty()) return absl::OkStatus();
  return LoadTensor(arguments.mask, "", *request.mutable_attention_mask());
}

void SetOptions(const AttendArguments& arguments, v1::AttendRequest& request) {
  if (!arguments.model.empty()) {
    request.mutable_layer()->set_model(arguments.model);
    request.mutable_layer()->set_stack(arguments.stack);
    request.mutable_layer()->set_layer(arguments.layer);
  }
  if (!arguments.layout.empty()) request.set_tensor_layout(Layouts().at(arguments.layout));
  request.mutable_query_lengths()->Assign(arguments.query_lengths.begin(),
                                          arguments.query_lengths.end());
  request.mutable_kv_lengths()->Assign(arguments.kv_lengths.begin(), arguments.kv_lengths.end());
  // What is not given stays unset: the layer's own values.
  v1::AttentionOptions& options = *request.mutable_options();
  if (arguments.causal) options.set_is_causal(true);
  if (arguments.window_left) options.set_window_left(*arguments.window_left);
  if (arguments.window_right) options.set_window_right(*arguments.window_right);
  if (arguments.scale) options.set_scale(*arguments.scale);
  if (arguments.soft_cap) options.set_soft_cap(*arguments.soft_cap);
  request.mutable_execution()->set_implementation(arguments.implementation);
  request.set_output_attentions(!arguments.weights.empty());
  request.set_output_lse(!arguments.lse.empty());
  if (!arguments.output_dtype.empty()) {
    request.set_output_dtype(*DataTypeFromName(arguments.output_dtype));
  }
}

absl::Status CheckArguments(const AttendArguments& arguments) {
  if (arguments.model.empty() && (arguments.layer != 0 || !arguments.stack.empty())) {
    return UsageError("--layer and --stack are a model's: give --model too");
  }
  if (arguments.layout == "packed" &&
      (arguments.query_lengths.empty() || arguments.kv_lengths.empty())) {
    return UsageError("--layout packed needs --query-lengths and --kv-lengths");
  }
  return absl::OkStatus();
}

struct Result {
  const char* name;  // the field of AttendResponse
  const v1::Tensor* tensor;
  const std::string* path;  // empty: not written
};

std::string ResultsJson(const std::vector<Result>& results, const v1::Execution& execution) {
  std::string json = "{";
  for (const Result& result : results) {
    absl::StrAppend(&json, "\n \"", result.name,
                    "\": {\"dtype\": ", JsonString(v1::DataType_Name(result.tensor->dtype())),
                    ", \"shape\": [", absl::StrJoin(result.tensor->shape(), ", "),
                    "], \"file\": ", result.path->empty() ? "null" : JsonString(*result.path),
                    "},");
  }
  return absl::StrCat(json, "\n \"execution\": ", ToJson(execution), "}\n");
}

std::string ExecutionText(const v1::Execution& execution) {
  Table table({});
  table.AddRow({"implementation", OrDash(execution.implementation())});
  table.AddRow({"backend", OrDash(execution.backend())});
  table.AddRow({"why", OrDash(execution.reason())});
  table.AddRow({"queued", SecondsText(execution.queue_seconds())});
  table.AddRow({"computed", SecondsText(execution.compute_seconds())});
  std::string work = absl::StrCat(CountText(static_cast<double>(execution.flops())), "FLOP");
  if (execution.compute_seconds() > 0) {
    const double rate = static_cast<double>(execution.flops()) / execution.compute_seconds();
    absl::StrAppend(&work, ", ", CountText(rate), "FLOP/s");
  }
  table.AddRow({"work", work});
  table.AddRow({"workspace", BytesText(execution.peak_workspace_bytes())});
  if (execution.has_sparsity()) table.AddRow({"sparsity", absl::StrCat(execution.sparsity())});
  if (execution.has_recovered_mass()) {
    table.AddRow({"recovered mass", absl::StrCat(execution.recovered_mass())});
  }
  return table.Render();
}

std::string ResultsText(const std::vector<Result>& results, const v1::Execution& execution) {
  Table table({"TENSOR", "DTYPE", "SHAPE", "FILE"});
  std::string hint;
  for (const Result& result : results) {
    table.AddRow({result.name, DataTypeName(result.tensor->dtype()), ShapeText(*result.tensor),
                  result.path->empty() ? "(not written)" : *result.path});
    if (result.tensor->dtype() == v1::DATA_TYPE_BFLOAT16 && !result.path->empty()) {
      hint = "bfloat16 files: numpy.load(FILE).view(ml_dtypes.bfloat16)\n";
    }
  }
  return absl::StrCat(table.Render(), hint, "\n", ExecutionText(execution));
}

absl::Status RunAttend(Client& client, const CommandLine& line, const AttendArguments& arguments) {
  if (absl::Status status = CheckArguments(arguments); !status.ok()) return status;
  v1::AttendRequest request;
  if (absl::Status status = LoadTensors(arguments, request); !status.ok()) return status;
  SetOptions(arguments, request);
  const auto response = client.Attend(request);
  if (!response.ok()) return response.status();

  std::vector<Result> results = {{"output", &response->output(), &arguments.output}};
  if (!arguments.weights.empty()) {
    results.push_back({"attention_weights", &response->attention_weights(), &arguments.weights});
  }
  if (!arguments.lse.empty()) results.push_back({"lse", &response->lse(), &arguments.lse});
  for (const Result& result : results) {
    if (result.path->empty()) continue;
    if (absl::Status status = WriteNpy(*result.path, *result.tensor); !status.ok()) return status;
  }
  return Print(line.json ? ResultsJson(results, response->execution())
                         : ResultsText(results, response->execution()));
}

void AddFileOptions(CLI::App& attend, AttendArguments& arguments) {
  const std::string files = "Files (.npy)";
  attend.add_option("--query", arguments.query, "[batch, heads, q_len, head_dim]; see --layout")
      ->required()
      ->type_name("FILE")
      ->group(files);
  attend.add_option("--key", arguments.key, "[batch, kv_heads, kv_len, head_dim]")
      ->required()
      ->type_name("FILE")
      ->group(files);
  attend.add_option("--value", arguments.value, "[batch, kv_heads, kv_len, value_dim]")
      ->required()
      ->type_name("FILE")
      ->group(files);
  attend
      .add_option("--mask", arguments.mask,
                  "bool (true: attend), added floats, or int64 padding [batch, kv_len]")
      ->type_name("FILE")
      ->group(files);
  attend.add_option("--output", arguments.output, "Write the result here")
      ->type_name("FILE")
      ->group(files);
  attend
      .add_option("--weights", arguments.weights, "Ask for the attention weights, and write them")
      ->type_name("FILE")
      ->group(files);
  attend
      .add_option("--lse", arguments.lse,
                  "Ask for the logarithms of the softmax's denominators, and write them")
      ->type_name("FILE")
      ->group(files);
}

void AddTensorOptions(CLI::App& attend, AttendArguments& arguments) {
  const std::string tensors = "Tensors";
  const CLI::IsMember floating({"float32", "float16", "bfloat16"});
  attend
      .add_option("--layout", arguments.layout,
                  "heads_first (default), tokens_first [batch, length, heads, dim], or packed "
                  "[tokens, heads, dim]")
      ->check(CLI::IsMember({"heads_first", "tokens_first", "packed"}))
      ->group(tensors);
  attend
      .add_option("--query-lengths", arguments.query_lengths,
                  "Tokens of each row, as 5,3,8; the rest is padding (packed: where rows end)")
      ->delimiter(',')
      ->group(tensors);
  attend.add_option("--kv-lengths", arguments.kv_lengths, "The same for key and value")
      ->delimiter(',')
      ->group(tensors);
  attend
      .add_option("--dtype", arguments.dtype,
                  "Convert query, key and value to this before they are sent")
      ->check(floating)
      ->group(tensors);
  attend
      .add_option("--output-dtype", arguments.output_dtype, "Of the result (default: the query's)")
      ->check(floating)
      ->group(tensors);
}

void AddAttentionOptions(CLI::App& attend, AttendArguments& arguments) {
  const std::string attention = "Attention (default: the layer's own, without a model off)";
  attend.add_flag("--causal", arguments.causal, "A query sees no key after its own position")
      ->group(attention);
  attend
      .add_option("--window-left", arguments.window_left,
                  "Keys that a query sees before its position; -1: all")
      ->group(attention);
  attend
      .add_option("--window-right", arguments.window_right,
                  "Keys that a query sees after its position; -1: all")
      ->group(attention);
  attend.add_option("--scale", arguments.scale, "Of the scores (default: 1 / sqrt(head_dim))")
      ->group(attention);
  attend.add_option("--soft-cap", arguments.soft_cap, "s becomes cap * tanh(s / cap); 0: off")
      ->group(attention);
  attend
      .add_option("--implementation", arguments.implementation,
                  "Use this one or fail; auto: choose for this request (default: the active one)")
      ->group(attention);
  attend.add_option("--model", arguments.model, "Take a hosted model's layer (default: no model)")
      ->group(attention);
  attend.add_option("--stack", arguments.stack, "Of a model with several")->group(attention);
  attend.add_option("--layer", arguments.layer, "From 0")->group(attention);
}

}  // namespace

void AddAttendCommand(CLI::App& app, CommandLine& line) {
  CLI::App* attend = app.add_subcommand("attend", "Compute attention on .npy files");
  auto arguments = std::make_shared<AttendArguments>();
  AddFileOptions(*attend, *arguments);
  AddTensorOptions(*attend, *arguments);
  AddAttentionOptions(*attend, *arguments);
  attend->callback([arguments, &line] {
    line.run = [arguments, &line](Client& client) { return RunAttend(client, line, *arguments); };
  });
}

}  // namespace attn::client
