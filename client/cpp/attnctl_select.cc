// select: what "auto" would choose for a request, and why each other implementation was passed
// over.
#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "client/cpp/attnctl.h"
#include "client/cpp/table.h"
#include "client/cpp/tensors.h"

namespace attn::client {
namespace {

namespace v1 = attention::v1;

struct SelectArguments {
  std::string model, stack, dtype;
  uint32_t layer = 0, batch = 1, q_len = 0, kv_len = 0;
  bool cross = false, cached = false, mask = false, weights = false, lse = false;
};

v1::SelectAttentionRequest RequestOf(const SelectArguments& arguments) {
  v1::SelectAttentionRequest request;
  v1::LayerRef& layer = *request.mutable_layer();
  layer.set_model(arguments.model);
  layer.set_stack(arguments.stack);
  layer.set_layer(arguments.layer);
  if (arguments.cross) layer.set_kind(v1::ATTENTION_KIND_CROSS);
  v1::AttentionShape& shape = *request.mutable_shape();
  shape.set_batch(arguments.batch);
  shape.set_q_len(arguments.q_len);
  shape.set_kv_len(arguments.kv_len == 0 ? arguments.q_len : arguments.kv_len);
  if (!arguments.dtype.empty()) shape.set_dtype(*DataTypeFromName(arguments.dtype));
  shape.set_cached(arguments.cached);
  shape.set_has_mask(arguments.mask);
  shape.set_output_attentions(arguments.weights);
  shape.set_output_lse(arguments.lse);
  return request;
}

// An implementation that can't do what is asked has no numbers.
std::string Known(double number, const std::string& text) { return number > 0.0 ? text : "-"; }

absl::Status RunSelect(Client& client, const CommandLine& line, const SelectArguments& arguments) {
  const auto response = client.SelectAttention(RequestOf(arguments));
  if (!response.ok()) return response.status();
  if (line.json) return PrintJson(*response);
  Table table({"IMPLEMENTATION", "CHOICE", "ESTIMATE", "SCRATCH", "OPERATIONS", "WHY"});
  for (const v1::Candidate& candidate : response->candidates()) {
    const bool chosen = candidate.implementation() == response->implementation();
    table.AddRow(
        {candidate.implementation(),
         chosen                 ? "chosen"
         : candidate.eligible() ? "possible"
                                : "no",
         Known(candidate.estimated_seconds(), SecondsText(candidate.estimated_seconds())),
         Known(candidate.estimated_seconds(), BytesText(candidate.workspace_bytes())),
         Known(candidate.estimated_seconds(), CountText(static_cast<double>(candidate.flops()))),
         candidate.reason()});
  }
  return Print(absl::StrCat(table.Render(), "\n", response->reason(), "\n"));
}

}  // namespace

void AddSelectCommand(CLI::App& app, CommandLine& line) {
  CLI::App& select = *app.add_subcommand(
      "select", "Show what 'auto' would choose for a request on a model's layer, and why");
  auto arguments = std::make_shared<SelectArguments>();
  const std::string where = "Layer";
  select.add_option("MODEL", arguments->model, "A hosted model")->type_name("")->required();
  select.add_option("--layer", arguments->layer, "From 0")->capture_default_str()->group(where);
  select.add_option("--stack", arguments->stack, "Of a model with several")->group(where);
  select.add_flag("--cross", arguments->cross, "Its cross-attention")->group(where);
  const std::string what = "Request";
  select.add_option("--queries", arguments->q_len, "Tokens of each row")
      ->type_name("N")
      ->required()
      ->check(CLI::PositiveNumber)
      ->group(what);
  select.add_option("--keys", arguments->kv_len, "Past and new ones (default: as many as queries)")
      ->type_name("N")
      ->group(what);
  select.add_option("--batch", arguments->batch, "Rows")
      ->type_name("N")
      ->capture_default_str()
      ->check(CLI::PositiveNumber)
      ->group(what);
  select.add_option("--dtype", arguments->dtype, "Of the queries (default: the model's)")
      ->check(CLI::IsMember({"float32", "float16", "bfloat16"}))
      ->group(what);
  select.add_flag("--cached", arguments->cached, "Earlier keys lie in sessions")->group(what);
  select.add_flag("--mask", arguments->mask, "With a mask")->group(what);
  select.add_flag("--weights", arguments->weights, "Attention weights are asked for")->group(what);
  select.add_flag("--lse", arguments->lse, "The log-sum-exp is asked for")->group(what);
  select.callback([arguments, &line] {
    line.run = [arguments, &line](Client& client) { return RunSelect(client, line, *arguments); };
  });
}

}  // namespace attn::client
