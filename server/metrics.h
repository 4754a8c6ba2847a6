// What Prometheus sees. Every call is recorded here, in one place, when it is answered; what can be
// read off the server's state (active implementations, queues) is read when it is scraped.
#pragma once

#include <prometheus/collectable.h>
#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "server/call_context.h"

namespace attn::server {

class Metrics {
 public:
  Metrics();

  // A call came in with so many bytes; its end is recorded by Finish.
  void Start(const std::string& rpc, std::uint64_t received_bytes);
  void Finish(const std::string& rpc, const CallContext& context, const std::string& code,
              std::uint64_t sent_bytes);

  void RecordSwitch(const std::string& model, const std::string& from, const std::string& to);

  // What is exposed: this registry, and what the server's state adds.
  const std::shared_ptr<prometheus::Registry>& registry() const { return registry_; }

 private:
  std::shared_ptr<prometheus::Registry> registry_;
  prometheus::Family<prometheus::Counter>& requests_;
  prometheus::Family<prometheus::Histogram>& duration_;
  prometheus::Family<prometheus::Histogram>& queue_;
  prometheus::Family<prometheus::Histogram>& compute_;
  prometheus::Gauge& in_flight_;
  prometheus::Family<prometheus::Counter>& received_;
  prometheus::Family<prometheus::Counter>& sent_;
  prometheus::Family<prometheus::Gauge>& peak_workspace_;
  prometheus::Family<prometheus::Counter>& fallbacks_;
  prometheus::Family<prometheus::Counter>& switches_;
  prometheus::Family<prometheus::Counter>& cached_tokens_;

  std::mutex peak_mutex_;
  std::map<std::pair<std::string, std::string>, std::uint64_t>
      peaks_;  // by model and implementation
};

class ServerState;

// The gauges that are read off the state at each scrape.
class StateCollector final : public prometheus::Collectable {
 public:
  explicit StateCollector(ServerState& state) : state_(state) {}
  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  std::vector<prometheus::MetricFamily> SessionFamilies() const;

  ServerState& state_;
};

}  // namespace attn::server
