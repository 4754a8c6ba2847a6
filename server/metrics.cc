#include "server/metrics.h"

#include <prometheus/metric_family.h>

#include <chrono>

#include "server/server_state.h"
#include "server/version.h"

namespace attn::server {
namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;

// Attention of one decode step takes tens of microseconds, of a long prefill seconds.
const prometheus::Histogram::BucketBoundaries kSeconds = {
    20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3,
    20e-3, 50e-3, 0.1,    0.2,    0.5,    1,    2,    5,    10};

prometheus::MetricFamily GaugeFamily(const std::string& name, const std::string& help) {
  prometheus::MetricFamily family;
  family.name = name;
  family.help = help;
  family.type = prometheus::MetricType::Gauge;
  return family;
}

void AddGauge(prometheus::MetricFamily& family, std::vector<prometheus::ClientMetric::Label> labels,
              double value) {
  prometheus::ClientMetric metric;
  metric.label = std::move(labels);
  metric.gauge.value = value;
  family.metric.push_back(std::move(metric));
}

}  // namespace

Metrics::Metrics()
    : registry_(std::make_shared<prometheus::Registry>()),
      requests_(BuildCounter()
                    .Name("attention_requests_total")
                    .Help("Calls that were answered, by rpc, model, implementation that executed, "
                          "and gRPC code")
                    .Register(*registry_)),
      duration_(BuildHistogram()
                    .Name("attention_request_duration_seconds")
                    .Help("From the complete request to its answer")
                    .Register(*registry_)),
      queue_(BuildHistogram()
                 .Name("attention_queue_seconds")
                 .Help("From the complete request to the start of its execution")
                 .Register(*registry_)),
      compute_(BuildHistogram()
                   .Name("attention_compute_seconds")
                   .Help("In kernels and projections alone")
                   .Register(*registry_)),
      in_flight_(BuildGauge()
                     .Name("attention_in_flight_requests")
                     .Help("Calls that came in and are not answered yet")
                     .Register(*registry_)
                     .Add({})),
      received_(BuildCounter()
                    .Name("attention_received_bytes_total")
                    .Help("Bytes of request messages")
                    .Register(*registry_)),
      sent_(BuildCounter()
                .Name("attention_sent_bytes_total")
                .Help("Bytes of answers")
                .Register(*registry_)),
      peak_workspace_(BuildGauge()
                          .Name("attention_peak_workspace_bytes")
                          .Help("The most scratch memory that one execution held at once")
                          .Register(*registry_)),
      fallbacks_(BuildCounter()
                     .Name("attention_fallbacks_total")
                     .Help("Executions by another implementation, because the active one could not "
                           "do what was asked")
                     .Register(*registry_)),
      switches_(BuildCounter()
                    .Name("attention_switches_total")
                    .Help("Switches of a model's active implementation")
                    .Register(*registry_)) {
  BuildGauge()
      .Name("attention_build_info")
      .Help("Always 1; the labels say what runs")
      .Register(*registry_)
      .Add({{"version", kVersion}})
      .Set(1.0);
}

void Metrics::Start(const std::string& rpc, std::uint64_t received_bytes) {
  in_flight_.Increment();
  received_.Add({{"rpc", rpc}}).Increment(static_cast<double>(received_bytes));
}

void Metrics::Finish(const std::string& rpc, const CallContext& context, const std::string& code,
                     std::uint64_t sent_bytes) {
  const CallFacts& facts = context.facts;
  in_flight_.Decrement();
  requests_
      .Add({{"rpc", rpc},
            {"model", facts.model},
            {"implementation", facts.implementation},
            {"code", code}})
      .Increment();
  duration_
      .Add({{"rpc", rpc}, {"model", facts.model}, {"implementation", facts.implementation}},
           kSeconds)
      .Observe(std::chrono::duration<double>(Clock::now() - context.arrival).count());
  sent_.Add({{"rpc", rpc}}).Increment(static_cast<double>(sent_bytes));
  if (!facts.executed) return;
  const prometheus::Labels labels = {{"model", facts.model},
                                     {"implementation", facts.implementation}};
  queue_.Add({{"model", facts.model}}, kSeconds).Observe(facts.queue_seconds);
  compute_.Add(labels, kSeconds).Observe(facts.compute_seconds);
  if (facts.fell_back) fallbacks_.Add(labels).Increment();
  std::lock_guard lock(peak_mutex_);
  std::uint64_t& peak = peaks_[{facts.model, facts.implementation}];
  peak = std::max(peak, facts.peak_workspace_bytes);
  peak_workspace_.Add(labels).Set(static_cast<double>(peak));
}

void Metrics::RecordSwitch(const std::string& model, const std::string& from,
                           const std::string& to) {
  switches_.Add({{"model", model}, {"from", from}, {"to", to}}).Increment();
}

std::vector<prometheus::MetricFamily> StateCollector::Collect() const {
  prometheus::MetricFamily active = GaugeFamily(
      "attention_active_implementation", "1 for the implementation that a model's requests get");
  prometheus::MetricFamily weights =
      GaugeFamily("attention_weight_bytes", "Of a model's parameters");
  const auto describe = [&](const ManagerPool& pool) {
    const std::string name = pool.active()->name();
    for (const ImplementationRow& row : state_.registry().table()) {
      AddGauge(active, {{"model", pool.name()}, {"implementation", row.name}},
               row.name == name ? 1.0 : 0.0);
    }
    AddGauge(active, {{"model", pool.name()}, {"implementation", kAutoImplementation}},
             name == kAutoImplementation ? 1.0 : 0.0);
    if (pool.model() != nullptr) {
      AddGauge(weights, {{"model", pool.name()}},
               static_cast<double>(pool.model()->weight_bytes()));
    }
  };
  const auto nameless = state_.registry().Find("");
  if (nameless.ok()) describe(**nameless);
  for (const std::shared_ptr<ManagerPool>& pool : state_.registry().List()) describe(*pool);

  prometheus::MetricFamily queued =
      GaugeFamily("attention_queued_requests", "Requests that wait for a device");
  prometheus::MetricFamily capacity =
      GaugeFamily("attention_queue_capacity", "Requests that may wait for a device");
  for (const std::unique_ptr<DeviceQueue>& queue : state_.queues()) {
    AddGauge(queued, {{"device", queue->name()}}, static_cast<double>(queue->size()));
    AddGauge(capacity, {{"device", queue->name()}}, static_cast<double>(queue->capacity()));
  }
  prometheus::MetricFamily used =
      GaugeFamily("attention_in_flight_bytes", "Of requests and answers in flight");
  AddGauge(used, {}, static_cast<double>(state_.budget().used()));
  prometheus::MetricFamily limit =
      GaugeFamily("attention_in_flight_limit_bytes", "The bound of the bytes in flight");
  AddGauge(limit, {}, static_cast<double>(state_.budget().limit()));
  return {std::move(active),   std::move(weights), std::move(queued),
          std::move(capacity), std::move(used),    std::move(limit)};
}

}  // namespace attn::server
