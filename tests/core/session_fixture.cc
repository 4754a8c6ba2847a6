#include "tests/core/session_fixture.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "core/attention_problem.h"
#include "core/cache_append.h"
#include "core/dtype_conversion.h"
#include "core/error.h"
#include "core/page_table.h"
#include "kernels/cpu/page_packing.h"

namespace attn::testing {
namespace {

constexpr std::int64_t kMaxTokens = 1 << 20;

LayerSpec SpecOfLayer(std::uint32_t heads, std::uint32_t kv_heads, std::uint32_t head_dim,
                      std::uint32_t value_dim, std::int64_t window) {
  LayerSpec spec;
  spec.num_heads = heads;
  spec.num_kv_heads = kv_heads;
  spec.head_dim = head_dim;
  spec.value_dim = value_dim;
  spec.options.is_causal = true;
  if (window >= 0) spec.options.window_left = window;
  return spec;
}

ModelSpec WindowsSpec() {
  ModelSpec spec;
  spec.name = "windows";
  spec.cache_dtype = DType::kBFloat16;
  LayerStack& stack = spec.stacks.emplace_back();
  stack.self_attention = {SpecOfLayer(2, 1, 3, 2, 20), SpecOfLayer(2, 2, 2, 3, -1),
                          SpecOfLayer(1, 1, 2, 2, 100)};
  stack.self_attention.front().repeat = 2;
  stack.cross_attention = {SpecOfLayer(1, 1, 2, 1, -1)};
  stack.cross_attention.front().options.is_causal = false;
  return spec;
}

ModelSpec PlainSpec() {
  ModelSpec spec;
  spec.name = "plain";
  spec.dtype = DType::kFloat16;
  spec.stacks.emplace_back().self_attention = {SpecOfLayer(1, 1, 5, 5, -1)};
  spec.stacks.front().self_attention.front().repeat = 2;
  return spec;
}

// All rows' tokens end to end, [tokens, heads, dim].
std::vector<char> PackedTokens(const LayerCall& call, std::int64_t dim, std::int64_t first) {
  std::vector<float> values;
  for (const RowTokens& row : call.rows) {
    for (const std::int64_t id : row.ids) {
      for (std::int64_t head = 0; head < call.dims.num_kv_heads; ++head) {
        for (std::int64_t i = 0; i < dim; ++i) values.push_back(TokenElement(id, head, first + i));
      }
    }
  }
  std::vector<char> bytes(values.size() * ItemSize(call.dtype) + 1);
  ConvertElements(values.data(), DType::kFloat32, bytes.data(), call.dtype, values.size());
  return bytes;
}

// What int8 made of TokenElements, mended: magnitudes up to 8 are off by at most 8 / 254, less than
// half of 1/8.
void RoundToEighths(std::vector<float>& row) {
  for (float& element : row) element = std::round(element * 8.0f) / 8.0f;
}

// A call's tensors and what refers to them.
struct Inputs {
  std::vector<char> query, key, value;
  AttendInputs attend;

  explicit Inputs(const LayerCall& call) {
    std::int64_t queries = 0;
    std::int64_t tokens = 0;
    for (const RowTokens& row : call.rows) {
      attend.query_lengths.push_back(row.queries);
      attend.kv_lengths.push_back(static_cast<std::int64_t>(row.ids.size()));
      queries += row.queries;
      tokens += attend.kv_lengths.back();
    }
    const CacheDims& dims = call.dims;
    attend.layout = TensorLayout::kPacked;
    const std::int64_t heads = 2 * dims.num_kv_heads;
    query.resize(static_cast<std::size_t>(queries * heads * dims.head_dim) * ItemSize(call.dtype) +
                 1);
    attend.query = TensorView(query.data(), call.dtype, {queries, heads, dims.head_dim});
    if (call.request.mode == CacheMode::kReadOnly) {
      attend.kv_lengths.clear();
      return;
    }
    key = PackedTokens(call, dims.head_dim, 0);
    value = PackedTokens(call, dims.value_dim, kValueElements);
    attend.key = TensorView(key.data(), call.dtype, {tokens, dims.num_kv_heads, dims.head_dim});
    attend.value =
        TensorView(value.data(), call.dtype, {tokens, dims.num_kv_heads, dims.value_dim});
  }
};

}  // namespace

float TokenElement(std::int64_t id, std::int64_t head, std::int64_t element) {
  std::uint64_t bits = static_cast<std::uint64_t>(id) * 0x9e3779b97f4a7c15u +
                       static_cast<std::uint64_t>(head * 8191 + element + 1) * 0xc2b2ae3d27d4eb4fu;
  bits = (bits ^ bits >> 29) * 0xbf58476d1ce4e5b9u;
  return static_cast<float>(static_cast<std::int64_t>(bits >> 57) - 64) / 8.0f;
}

SessionFixture::SessionFixture(std::uint64_t cache_bytes, std::size_t max_sessions)
    : registry_(BuiltInImplementations(), {{&device_.device(), &device_.workspace()}}),
      cache_(std::make_shared<CachePool>(device_.device(), cache_bytes)),
      table_(cache_, {.max_sessions = max_sessions, .now = [this] { return now_; }}) {
  EXPECT_TRUE(registry_.Load(WindowsSpec(), "").ok());
  EXPECT_TRUE(registry_.Load(PlainSpec(), "").ok());
}

const HostedLayer* SessionFixture::Layer(const std::string& model, const CacheKey& key) {
  if (model.empty()) return nullptr;
  return *Pool(model)->model()->Find({model, key.stack, key.layer, key.kind});
}

CacheDims SessionFixture::DimsOfLayer(const std::string& model, const CacheKey& key) {
  return DimsOf(*Layer(model, key)->spec, DType::kUnspecified);
}

std::shared_ptr<Session> SessionFixture::Open(const std::string& model, SessionOptions options) {
  absl::StatusOr<std::shared_ptr<Session>> session = table_.Open(Pool(model), options);
  EXPECT_TRUE(session.ok()) << session.status();
  return *std::move(session);
}

absl::StatusOr<std::vector<std::int64_t>> SessionFixture::Run(
    const std::vector<std::shared_ptr<Session>>& sessions, const LayerCall& call) {
  const HostedLayer* const layer = Layer(sessions.front()->model(), call.key);
  ATTN_ASSIGN_OR_RETURN(const std::shared_ptr<CacheCall> cache,
                        CacheCall::Create(sessions, call.key, layer, call.request));
  Inputs inputs(call);
  inputs.attend.cache = &cache->rows();
  if (layer == nullptr) inputs.attend.options.is_causal = call.is_causal;
  if (call.request_window >= 0) inputs.attend.options.window_left = call.request_window;
  // Heads of queries are the layer's own.
  if (layer != nullptr) {
    TensorView& query = inputs.attend.query;
    query = TensorView(
        query.data, query.dtype,
        {query.extent(0), static_cast<std::int64_t>(layer->spec->num_heads), query.extent(2)});
  }
  ATTN_ASSIGN_OR_RETURN(
      AttentionProblem problem,
      AttentionProblem::Create(inputs.attend, layer == nullptr ? nullptr : layer->spec.get(),
                               kMaxTokens));
  ATTN_RETURN_IF_ERROR(ReserveCache(problem, *cache));
  device_.Execute([&](ExecutionContext& context) {
    AppendToCache(problem, *cache, context.device.executor());
  });
  // What the answer would say is known before, and is what the caches then have.
  const std::vector<std::int64_t> told = cache->CacheLengths();
  if (call.commit) cache->Commit();
  std::vector<std::int64_t> lengths;
  for (const std::shared_ptr<Session>& session : sessions) {
    const auto& layers = SessionInspector::Layers(*session);
    const auto found = layers.find(call.key);
    lengths.push_back(found == layers.end() ? 0 : found->second.length);
  }
  if (call.commit) {
    EXPECT_EQ(told, lengths);
  }
  return lengths;
}

std::string SessionFixture::Differs(const Session& session, const CacheKey& key,
                                    const std::vector<std::int64_t>& ids) {
  const auto& layers = SessionInspector::Layers(session);
  const auto found = layers.find(key);
  if (found == layers.end()) return ids.empty() ? "" : "the layer does not exist";
  const LayerCache& layer = found->second;
  if (layer.length != static_cast<std::int64_t>(ids.size())) {
    return absl::StrCat("length ", layer.length, ", expected ", ids.size());
  }
  const CacheDims& dims = layer.dims;
  const kernels::PageLayout layout = LayoutOf(dims);
  std::vector<float> key_row(static_cast<std::size_t>(dims.head_dim));
  std::vector<float> value_row(static_cast<std::size_t>(dims.value_dim));
  for (std::int64_t token = layer.first_token; token < layer.length; ++token) {
    const BlockRef& block = layer.blocks[static_cast<std::size_t>(token / kBlockTokens)];
    if (!block) return absl::StrCat("token ", token, " lies in no block");
    for (std::int64_t head = 0; head < dims.num_kv_heads; ++head) {
      const char* const page = static_cast<const char*>(block->data()) + head * layout.page_bytes();
      kernels::cpu::UnpackTokens(layout, page, {token % kBlockTokens, 1},
                                 {kernels::ElementType::kFloat32, key_row.data(), value_row.data(),
                                  dims.head_dim, dims.value_dim});
      const std::int64_t id = ids[static_cast<std::size_t>(token)];
      if (dims.dtype == DType::kInt8) {
        RoundToEighths(key_row);
        RoundToEighths(value_row);
      }
      bool same = true;
      for (std::int64_t i = 0; i < dims.head_dim; ++i) {
        same = same && key_row[static_cast<std::size_t>(i)] == TokenElement(id, head, i);
      }
      for (std::int64_t i = 0; i < dims.value_dim; ++i) {
        same = same &&
               value_row[static_cast<std::size_t>(i)] == TokenElement(id, head, kValueElements + i);
      }
      if (!same) return absl::StrCat("token ", token, " of head ", head, " is not ", id);
    }
  }
  return "";
}

void SessionFixture::Advance(double seconds) {
  now_ +=
      std::chrono::duration_cast<SessionClock::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace attn::testing
