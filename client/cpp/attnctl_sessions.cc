// sessions, session: whose cache the server holds. Whoever has a session's id can use it, so none
// is printed.
#include <CLI/CLI.hpp>
#include <memory>

#include "absl/strings/str_cat.h"
#include "client/cpp/attnctl.h"
#include "client/cpp/table.h"

namespace attn::client {
namespace {

namespace v1 = attention::v1;

absl::Status RunSessions(Client& client, const CommandLine& line, const std::string& model) {
  const auto response = client.ListAllSessions(model);
  if (!response.ok()) return response.status();
  if (line.json) return PrintJson(*response);
  if (response->sessions().empty()) {
    return Print(model.empty() ? "no sessions" : absl::StrCat("no sessions of ", model));
  }
  Table table({"SESSION", "MODEL", "LENGTH", "CACHE", "IDLE", "AGE", "PRINCIPAL"});
  for (const v1::SessionStatus& session : response->sessions()) {
    // "..." as long as what an id lacks is more than the server tells.
    table.AddRow({absl::StrCat(session.id_prefix(), "..."), OrDash(session.model()),
                  absl::StrCat(session.length()), BytesText(session.bytes()),
                  SecondsText(session.idle_seconds()), SecondsText(session.age_seconds()),
                  OrDash(session.principal())});
  }
  return Print(table.Render());
}

std::string SessionText(const v1::GetSessionResponse& session) {
  Table facts({});
  facts.AddRow({"model", OrDash(session.model())});
  facts.AddRow({"cache", BytesText(session.bytes())});
  facts.AddRow({"idle", SecondsText(session.idle_seconds())});
  facts.AddRow({"expires after", SecondsText(session.time_to_live_seconds())});
  if (session.layers().empty()) return absl::StrCat(facts.Render(), "\nno tokens in any layer\n");
  Table layers({"STACK", "LAYER", "KIND", "LENGTH", "FIRST HELD", "LAST STEP"});
  for (const v1::LayerCache& layer : session.layers()) {
    const std::string kind = EnumText(v1::AttentionKind_Name(layer.kind()), "ATTENTION_KIND_");
    layers.AddRow({OrDash(layer.stack()), absl::StrCat(layer.layer()), kind,
                   absl::StrCat(layer.length()), absl::StrCat(layer.first_position()),
                   absl::StrCat(layer.last_step())});
  }
  return absl::StrCat(facts.Render(), "\n", layers.Render());
}

absl::Status RunSession(Client& client, const CommandLine& line, const std::string& id) {
  v1::GetSessionRequest request;
  request.set_session_id(id);
  const auto response = client.GetSession(request);
  if (!response.ok()) return response.status();
  return line.json ? PrintJson(*response) : Print(SessionText(*response));
}

}  // namespace

void AddSessionCommands(CLI::App& app, CommandLine& line) {
  CLI::App* sessions = app.add_subcommand("sessions", "List the open sessions");
  auto model = std::make_shared<std::string>();
  sessions->add_option("--model", *model, "Of this model alone (default: of all)");
  sessions->callback([model, &line] {
    line.run = [model, &line](Client& client) { return RunSessions(client, line, *model); };
  });
  CLI::App* session =
      app.add_subcommand("session", "Show a session's layers, lengths and bytes; touches it");
  auto id = std::make_shared<std::string>();
  session->add_option("ID", *id, "As OpenSession returned it; a prefix will not do")
      ->type_name("")
      ->required();
  session->callback([id, &line] {
    line.run = [id, &line](Client& client) { return RunSession(client, line, *id); };
  });
}

}  // namespace attn::client
