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

void AddSingle(std::vector<prometheus::MetricFamily>& families, const std::string& name,
               const std::string& help, double value) {
  families.push_back(GaugeFamily(name, help));
  AddGauge(families.back(), {}, value);
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
                    .Register(*registry_)),
      cached_tokens_(BuildCounter()
                         .Name("attention_cached_tokens_total")
                         .Help("Tokens that calls added to sessions' caches, once for each layer")
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
            {"modality", facts.modality},
            {"implementation", facts.implementation},
            {"code", code}})
      .Increment();
  duration_
      .Add({{"rpc", rpc},
            {"model", facts.model},
            {"modality", facts.modality},
            {"implementation", facts.implementation}},
           kSeconds)
      .Observe(std::chrono::duration<double>(Clock::now() - context.arrival).count());
  sent_.Add({{"rpc", rpc}}).Increment(static_cast<double>(sent_bytes));
  if (!facts.executed) return;
  const prometheus::Labels labels = {{"model", facts.model},
                                     {"implementation", facts.implementation}};
  queue_.Add({{"model", facts.model}}, kSeconds).Observe(facts.queue_seconds);
  prometheus::Labels compute = labels;
  compute.emplace("modality", facts.modality);
  compute_.Add(compute, kSeconds).Observe(facts.compute_seconds);
  if (facts.cached_tokens > 0) {
    cached_tokens_.Add({{"model", facts.model}})
        .Increment(static_cast<double>(facts.cached_tokens));
  }
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
  std::vector<prometheus::MetricFamily> families = SessionFamilies();
  for (prometheus::MetricFamily* family : {&active, &weights, &queued, &capacity}) {
    families.push_back(std::move(*family));
  }
  const MemoryBudget& budget = state_.budget();
  AddSingle(families, "attention_in_flight_bytes", "Of requests and answers in flight",
            static_cast<double>(budget.used()));
  AddSingle(families, "attention_in_flight_limit_bytes", "The bound of the bytes in flight",
            static_cast<double>(budget.limit()));
  return families;
}

std::vector<prometheus::MetricFamily> StateCollector::SessionFamilies() const {
  const SessionTable& table = state_.sessions();
  prometheus::MetricFamily sessions = GaugeFamily("attention_sessions", "Open sessions");
  prometheus::MetricFamily bytes =
      GaugeFamily("attention_session_cache_bytes",
                  "Of sessions' caches; what forks share is counted once for each");
  for (const auto& [model, usage] : table.UsageByModel()) {
    AddGauge(sessions, {{"model", model}}, static_cast<double>(usage.sessions));
    AddGauge(bytes, {{"model", model}}, static_cast<double>(usage.bytes));
  }
  prometheus::MetricFamily events;
  events.name = "attention_session_events_total";
  events.help = "Sessions that were opened, forked, closed, and that expired";
  events.type = prometheus::MetricType::Counter;
  const SessionTable::Events counts = table.events();
  for (const auto& [event, count] :
       {std::pair("opened", counts.opened), std::pair("forked", counts.forked),
        std::pair("closed", counts.closed), std::pair("expired", counts.expired)}) {
    prometheus::ClientMetric metric;
    metric.label = {{"event", event}};
    metric.counter.value = static_cast<double>(count);
    events.metric.push_back(std::move(metric));
  }
  std::vector<prometheus::MetricFamily> families = {std::move(sessions), std::move(bytes),
                                                    std::move(events)};
  AddSingle(families, "attention_cache_bytes", "That caches hold or have set aside",
            static_cast<double>(table.cache().used()));
  AddSingle(families, "attention_cache_limit_bytes", "The bound of the caches' bytes",
            static_cast<double>(table.cache().limit()));
  AddSingle(families, "attention_calls_waiting_for_sessions",
            "Calls behind earlier ones on the same sessions",
            static_cast<double>(state_.lanes().waiting()));
  return families;
}

}  // namespace attn::server
