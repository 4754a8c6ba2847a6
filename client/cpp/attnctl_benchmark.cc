// benchmark: implementations side by side on the server's own hardware.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cpp/attnctl.h"
#include "client/cpp/benchmark_plot.h"
#include "client/cpp/npy.h"
#include "client/cpp/table.h"
#include "client/cpp/tensors.h"

namespace attn::client {
namespace {

namespace v1 = attention::v1;

constexpr double kServerSeconds = 10;  // where --seconds is not given; the server may have another

struct BenchmarkArguments {
  std::string model, stack, dtype, hidden, plot;
  uint32_t layer = 0;
  bool cross = false;
  uint32_t batch = 1, q_len = 512;
  std::optional<uint32_t> kv_len;
  bool cached = false, mask = false, weights = false;
  std::vector<std::string> implementations;
  uint32_t iterations = 0;
  double seconds = 0;
  uint64_t bytes = 0;
};

// One line that is written over on a terminal; lines at every tenth elsewhere.
class Progress {
 public:
  void Show(const v1::BenchmarkProgress& progress) {
    const int percent = static_cast<int>(progress.fraction() * 100);
    const std::string text =
        absl::StrFormat("benchmark: %3d %%  %s", percent, progress.implementation());
    if (terminal_) {
      std::fprintf(stderr, "\r%-60s", text.c_str());
    } else if (percent >= next_) {
      std::fprintf(stderr, "%s\n", text.c_str());
      next_ = percent / 10 * 10 + 10;
    }
    std::fflush(stderr);
    shown_ = true;
  }
  ~Progress() {
    if (terminal_ && shown_) std::fputc('\n', stderr);
  }

 private:
  const bool terminal_ = isatty(STDERR_FILENO) != 0;
  int next_ = 0;
  bool shown_ = false;
};

absl::Status FillRequest(const BenchmarkArguments& arguments,
                         v1::BenchmarkAttentionRequest& request) {
  v1::LayerRef& layer = *request.mutable_layer();
  layer.set_model(arguments.model);
  layer.set_stack(arguments.stack);
  layer.set_layer(arguments.layer);
  if (arguments.cross) layer.set_kind(v1::ATTENTION_KIND_CROSS);
  for (const std::string& name : arguments.implementations) request.add_implementations(name);
  request.set_iterations(arguments.iterations);
  request.set_max_seconds(arguments.seconds);
  request.set_max_bytes(arguments.bytes);
  if (!arguments.hidden.empty()) {
    absl::StatusOr<NpyFile> file = ReadNpy(arguments.hidden);
    if (!file.ok()) return file.status();
    if (!file->note.empty()) std::fprintf(stderr, "attnctl: note: %s\n", file->note.c_str());
    *request.mutable_hidden_states() = std::move(file->tensor);
    return absl::OkStatus();
  }
  v1::AttentionShape& shape = *request.mutable_shape();
  shape.set_batch(arguments.batch);
  shape.set_q_len(arguments.q_len);
  shape.set_kv_len(arguments.kv_len.value_or(arguments.q_len));
  if (!arguments.dtype.empty()) shape.set_dtype(*DataTypeFromName(arguments.dtype));
  shape.set_cached(arguments.cached);
  shape.set_has_mask(arguments.mask);
  shape.set_output_attentions(arguments.weights);
  return absl::OkStatus();
}

std::string Title(const BenchmarkArguments& arguments) {
  const std::string layer = absl::StrCat(arguments.model, ", layer ", arguments.layer);
  if (!arguments.hidden.empty()) return absl::StrCat(layer, ", ", arguments.hidden);
  return absl::StrCat(layer, ", batch ", arguments.batch, ", q_len ", arguments.q_len, ", kv_len ",
                      arguments.kv_len.value_or(arguments.q_len),
                      arguments.cached ? ", cached" : "");
}

std::string RateText(const v1::BenchmarkResult& result) {
  if (result.median_seconds() <= 0) return "-";
  return absl::StrCat(CountText(static_cast<double>(result.flops()) / result.median_seconds()),
                      "FLOP/s");
}

absl::Status PrintResults(const std::string& title,
                          const std::vector<v1::BenchmarkResult>& results) {
  Table table({"IMPLEMENTATION", "BACKEND", "MEDIAN", "MIN", "P95", "RUNS", "WORKSPACE", "RATE",
               "MAX ERROR", "RELATIVE", "WHY NOT"});
  for (const v1::BenchmarkResult& result : results) {
    if (!result.error().empty()) {
      table.AddRow({result.implementation(), result.backend(), "-", "-", "-", "-", "-", "-", "-",
                    "-", result.error()});
      continue;
    }
    table.AddRow({result.implementation(), result.backend(), SecondsText(result.median_seconds()),
                  SecondsText(result.min_seconds()), SecondsText(result.p95_seconds()),
                  absl::StrCat(result.iterations()), BytesText(result.peak_workspace_bytes()),
                  RateText(result), absl::StrFormat("%.1e", result.max_abs_error()),
                  absl::StrFormat("%.1e", result.relative_error()), ""});
  }
  return Print(absl::StrCat(title, "\n", table.Render()));
}

absl::Status WritePlot(const std::string& path, const std::string& svg) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << svg;
  file.close();
  return file ? absl::OkStatus() : absl::DataLossError(absl::StrCat(path, " cannot be written"));
}

absl::Status PrintJsonResults(const std::vector<v1::BenchmarkResult>& results) {
  std::string json = "[";
  for (const v1::BenchmarkResult& result : results) {
    absl::StrAppend(&json, json.size() > 1 ? ",\n" : "\n", ToJson(result));
  }
  return Print(json + "]");
}

absl::Status RunBenchmark(Client& client, const CommandLine& line,
                          const BenchmarkArguments& arguments) {
  v1::BenchmarkAttentionRequest request;
  if (absl::Status status = FillRequest(arguments, request); !status.ok()) return status;
  CallOptions options;
  options.timeout_seconds = 0;
  if (line.timeout_seconds > 0) {  // beside the time that the benchmark may take by itself
    options.timeout_seconds =
        line.timeout_seconds + (arguments.seconds > 0 ? arguments.seconds : kServerSeconds);
  }
  std::vector<v1::BenchmarkResult> results;
  absl::Status status;
  {
    Progress progress;
    const auto take = [&](const v1::BenchmarkAttentionResponse& event) {
      if (event.has_progress()) progress.Show(event.progress());
      if (event.has_result()) results.push_back(event.result());
    };
    status = client.BenchmarkAttention(request, take, options);
  }
  if (!status.ok()) return status;
  const std::string title = Title(arguments);
  if (!arguments.plot.empty()) {
    status = WritePlot(arguments.plot, BenchmarkSvg(title, results));
    if (!status.ok()) return status;
  }
  return line.json ? PrintJsonResults(results) : PrintResults(title, results);
}

void AddSampleOptions(CLI::App& command, BenchmarkArguments& arguments) {
  const std::string sample = "Sample";
  command.add_option("--batch", arguments.batch, "Rows")->capture_default_str()->group(sample);
  command.add_option("--q-len", arguments.q_len, "Queries of a row")
      ->capture_default_str()
      ->group(sample);
  command.add_option("--kv-len", arguments.kv_len, "Keys of a row, past and new (default: q-len)")
      ->group(sample);
  command.add_option("--dtype", arguments.dtype, "Of the tensors (default: the model's)")
      ->check(CLI::IsMember({"float32", "float16", "bfloat16"}))
      ->group(sample);
  command.add_flag("--cached", arguments.cached, "Keys and values lie in caches' pages")
      ->group(sample);
  command.add_flag("--mask", arguments.mask, "With a mask over all queries and keys")
      ->group(sample);
  command.add_flag("--output-attentions", arguments.weights, "The weights are returned")
      ->group(sample);
  command
      .add_option("--hidden", arguments.hidden,
                  "A .npy file of hidden states [batch, q_len, hidden_size] instead: the attention "
                  "inside Forward on them")
      ->type_name("FILE")
      ->group(sample);
}

}  // namespace

void AddBenchmarkCommand(CLI::App& app, CommandLine& line) {
  CLI::App* command = app.add_subcommand(
      "benchmark", "Time implementations side by side on the server, while it serves");
  auto arguments = std::make_shared<BenchmarkArguments>();
  command->add_option("MODEL", arguments->model, "A name from 'attnctl models'")
      ->type_name("")
      ->required();
  command->add_option("--layer", arguments->layer, "From 0")->capture_default_str();
  command->add_option("--stack", arguments->stack, "Of a model with several");
  command->add_flag("--cross", arguments->cross, "Its cross-attention");
  AddSampleOptions(*command, *arguments);
  command
      ->add_option("--implementations", arguments->implementations,
                   "Names, separated by commas (default: all that can serve the sample)")
      ->delimiter(',');
  command->add_option("--iterations", arguments->iterations,
                      "Timed executions of each (default: until medians are steady)");
  command->add_option("--seconds", arguments->seconds,
                      "After which it ends with what it has (default: the server's)");
  command->add_option("--bytes", arguments->bytes,
                      "Memory that it may use (default: the server's)");
  command->add_option("--plot", arguments->plot, "Write the results as an SVG picture")
      ->type_name("FILE");
  command->callback([arguments, &line] {
    line.run = [arguments, &line](Client& client) {
      return RunBenchmark(client, line, *arguments);
    };
  });
}

}  // namespace attn::client
