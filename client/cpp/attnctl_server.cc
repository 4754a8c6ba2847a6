// implementations, hardware, info: what the server is and can do.
#include <CLI/CLI.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/cpp/attnctl.h"
#include "client/cpp/table.h"
#include "client/cpp/tensors.h"

namespace attn::client {
namespace {

namespace v1 = attention::v1;

std::string YesNo(bool value) { return value ? "yes" : "no"; }

// Comma-separated, without spaces, so that a cell stays one word.
std::string DataTypes(const v1::Implementation& implementation) {
  return absl::StrJoin(implementation.dtypes(), ",", [](std::string* out, int dtype) {
    absl::StrAppend(out, DataTypeName(static_cast<v1::DataType>(dtype)));
  });
}

absl::Status RunImplementations(Client& client, const CommandLine& line) {
  const auto response = client.ListImplementations();
  if (!response.ok()) return response.status();
  if (line.json) return PrintJson(*response);
  Table table({"IMPLEMENTATION", "BACKENDS", "DTYPES", "EXACT", "WEIGHTS", "MEMORY", "COMPUTE",
               "DESCRIPTION"});
  for (const v1::Implementation& row : response->implementations()) {
    table.AddRow({row.name(), OrDash(absl::StrJoin(row.backends(), ",")), OrDash(DataTypes(row)),
                  YesNo(row.exact()), YesNo(row.outputs_attentions()), OrDash(row.memory()),
                  OrDash(row.compute()), row.description()});
  }
  return Print(table.Render());
}

std::string CpuText(const v1::Cpu& cpu) {
  Table table({});
  table.AddRow({"cpu", OrDash(cpu.model())});
  table.AddRow({"cores", absl::StrCat(cpu.cores())});
  table.AddRow({"memory", absl::StrCat(BytesText(cpu.memory_bytes()), ", ",
                                       BytesText(cpu.available_bytes()), " available")});
  table.AddRow({"kernels for", OrDash(absl::StrJoin(cpu.features(), ", "))});
  table.AddRow({"in use", OrDash(cpu.active())});
  return table.Render();
}

absl::Status RunHardware(Client& client, const CommandLine& line) {
  const auto response = client.GetHardware();
  if (!response.ok()) return response.status();
  if (line.json) return PrintJson(*response);
  if (response->gpus().empty()) return Print(CpuText(response->cpu()) + "gpus         none\n");
  Table gpus({"GPU", "CAPABILITY", "TENSOR CORES", "MEMORY", "FREE", "MULTIPROCESSORS"});
  for (const v1::Gpu& gpu : response->gpus()) {
    gpus.AddRow({gpu.name(), gpu.compute_capability(), YesNo(gpu.tensor_cores()),
                 BytesText(gpu.memory_bytes()), BytesText(gpu.free_bytes()),
                 absl::StrCat(gpu.multiprocessors())});
  }
  return Print(absl::StrCat(CpuText(response->cpu()), "\n", gpus.Render()));
}

absl::Status RunInfo(Client& client, const CommandLine& line) {
  const auto response = client.GetServerInfo();
  if (!response.ok()) return response.status();
  if (line.json) return PrintJson(*response);
  Table table({});
  table.AddRow({"address", client.address()});
  table.AddRow({"version", OrDash(response->version())});
  table.AddRow({"epoch", OrDash(response->server_epoch())});
  table.AddRow({"shared memory", response->shared_memory() ? "on" : "off"});
  table.AddRow({"largest request", BytesText(response->max_request_bytes())});
  table.AddRow({"largest answer", BytesText(response->max_response_bytes())});
  table.AddRow({"tokens of a request", absl::StrCat(response->max_tokens())});
  table.AddRow({"requests on a stream", absl::StrCat(response->max_stream_requests())});
  table.AddRow({"bytes on a stream", BytesText(response->max_stream_bytes())});
  return Print(table.Render());
}

void Add(CLI::App& app, CommandLine& line, const char* name, const char* help,
         absl::Status (*run)(Client&, const CommandLine&)) {
  app.add_subcommand(name, help)->callback([run, &line] {
    line.run = [run, &line](Client& client) { return run(client, line); };
  });
}

}  // namespace

void AddServerCommands(CLI::App& app, CommandLine& line) {
  Add(app, line, "implementations", "List the attention implementations and what they can do",
      RunImplementations);
  Add(app, line, "hardware", "Show the server's CPU, memory and GPUs", RunHardware);
  Add(app, line, "info", "Show the server's version and limits", RunInfo);
}

}  // namespace attn::client
