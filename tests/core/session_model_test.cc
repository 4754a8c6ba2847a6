// Random operations on hundreds of sessions, against a plain model after each of them: outcomes,
// contents, lengths, steps, owners of blocks, bytes of the budget.
#include "tests/core/session_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <random>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn::testing {
namespace {

constexpr std::uint32_t kSeed = 20240229;
constexpr int kOperations = 20000;
constexpr std::uint64_t kCacheBytes = 4000 << 10;
constexpr std::size_t kMaxSessions = 400;
constexpr std::int64_t kBusySessions = 50;
constexpr int kCompareAllEvery = 100;

const char* const kModels[] = {"", "windows", "plain"};
constexpr DType kFloating[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
constexpr DType kOfCaches[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8};

CacheKey Self(std::uint32_t layer) { return {"", layer, AttentionKind::kSelf}; }
CacheKey Cross(std::uint32_t layer) { return {"", layer, AttentionKind::kCross}; }

// The layers of each model, as session_fixture.h describes them.
const SessionModel::Rules& RulesOf(const std::string& model) {
  static const CacheDims kNarrow = {1, 3, 2, DType::kUnspecified};
  static const CacheDims kPlain = {1, 5, 5, DType::kUnspecified};
  static const SessionModel::Rules kWindows = {
      {Self(0), {20, true, kNarrow}},
      {Self(1), {20, true, kNarrow}},
      {Self(2), {-1, true, {2, 2, 3, DType::kUnspecified}}},
      {Self(3), {100, true, {1, 2, 2, DType::kUnspecified}}},
      {Cross(0), {-1, false, {1, 2, 1, DType::kUnspecified}}}};
  static const SessionModel::Rules kPlainRules = {{Self(0), {-1, true, kPlain}},
                                                  {Self(1), {-1, true, kPlain}}};
  static const SessionModel::Rules kNone = {{Self(0), {}}, {Self(7), {}}};
  return model == "windows" ? kWindows : model == "plain" ? kPlainRules : kNone;
}

// Dimensions of sessions without a model: each differs from the other in head_dim.
constexpr CacheDims kVariants[] = {{1, 3, 2, DType::kUnspecified}, {2, 2, 4, DType::kUnspecified}};

Outcome OutcomeOf(const absl::Status& status) { return {status.code(), ErrorReason(status)}; }

class SessionModelTest : public ::testing::Test {
 protected:
  struct Pair {
    std::string id;
    std::shared_ptr<PlainSession> plain;
    std::shared_ptr<Session> session;  // to look at it without touching it
  };

  std::int64_t UpTo(std::int64_t largest) {
    return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(largest + 1));
  }
  bool Percent(int chance) { return UpTo(99) < chance; }
  template <typename T, std::size_t n>
  T OneOf(const T (&list)[n]) {
    return list[UpTo(n - 1)];
  }

  void Expect(const Outcome& expected, const absl::Status& actual, const std::string& what) {
    ++outcomes_[absl::StrCat(what, " ", ToText(expected))];
    EXPECT_EQ(ToText(expected), ToText(OutcomeOf(actual))) << what << ": " << actual;
  }

  // As the handlers do it: touches the session, or finds that it has expired.
  std::shared_ptr<Session> Find(const Pair& pair);
  void ExpirePlain();

  void Open();
  void Fork();
  void Close();
  void Expire();
  void Call();

  LayerCall MakeCall(const std::string& model, const std::vector<Pair>& rows);
  void AddRow(const PlainLayer& layer, LayerCall& call);
  std::vector<Pair> PickRows(std::size_t count);
  std::string KindOf(const LayerCall& call, const Outcome& outcome,
                     const std::vector<std::uint64_t>& last_steps);

  void Compare(const Pair& pair, bool all_contents, const CacheKey& key);
  void CompareLayer(const PlainLayer& plain, const LayerCache& layer);
  void CompareTotals();
  void ExpectVariety();

  std::mt19937 random_{kSeed};
  SessionFixture fixture_{kCacheBytes, kMaxSessions};
  SessionModel model_{kCacheBytes};
  std::vector<Pair> open_;
  std::vector<std::string> gone_;  // ids of sessions that ended
  std::int64_t next_token_ = 1;
  std::map<std::string, int> outcomes_;
};

std::shared_ptr<Session> SessionModelTest::Find(const Pair& pair) {
  const double idle = std::chrono::duration<double>(fixture_.now() - pair.plain->last_used).count();
  const bool expired = idle > pair.plain->time_to_live_seconds;
  const auto session = fixture_.table().Find(pair.id);
  EXPECT_EQ(session.ok(), !expired);
  if (expired) {
    Expect({absl::StatusCode::kNotFound, "SESSION_NOT_FOUND"}, session.status(), "find expired");
    ExpirePlain();
    return nullptr;
  }
  pair.plain->last_used = fixture_.now();
  return session.ok() ? *session : nullptr;
}

void SessionModelTest::ExpirePlain() {
  std::erase_if(open_, [&](const Pair& pair) {
    const double idle =
        std::chrono::duration<double>(fixture_.now() - pair.plain->last_used).count();
    if (idle <= pair.plain->time_to_live_seconds) return false;
    gone_.push_back(pair.id);
    return true;
  });
}

void SessionModelTest::Open() {
  const std::string model = OneOf(kModels);
  auto plain = std::make_shared<PlainSession>();
  plain->model = model;
  SessionOptions options;
  if (Percent(model.empty() ? 60 : 30)) options.cache_dtype = OneOf(kOfCaches);
  options.time_to_live_seconds = static_cast<double>(300 + UpTo(2000));
  if (Percent(50)) options.rollback_tokens = static_cast<std::uint64_t>(1 + UpTo(80));
  if (!model.empty() && Percent(15)) {
    options.reserve_tokens = static_cast<std::uint64_t>(1 + UpTo(150));
  }
  plain->dtype = options.cache_dtype;
  if (plain->dtype == DType::kUnspecified && !model.empty()) {
    plain->dtype = model == "windows" ? DType::kBFloat16 : DType::kFloat16;
  }
  if (options.rollback_tokens > 0) {
    plain->rollback_tokens = static_cast<std::int64_t>(options.rollback_tokens);
  }
  plain->time_to_live_seconds = options.time_to_live_seconds;
  plain->last_used = fixture_.now();
  Outcome expected;
  if (options.reserve_tokens > 0) {
    std::vector<CacheDims> layers;
    for (const auto& [key, rule] : RulesOf(model)) {
      if (key.kind == AttentionKind::kSelf) layers.push_back(rule.dims);
    }
    expected = model_.Reserve(*plain, layers, static_cast<std::int64_t>(options.reserve_tokens));
  }
  if (expected.ok() && open_.size() >= kMaxSessions) {
    expected = {absl::StatusCode::kResourceExhausted, "TOO_MANY_SESSIONS"};
  }
  const auto session = fixture_.table().Open(fixture_.Pool(model), options);
  Expect(expected, session.status(), options.reserve_tokens > 0 ? "reserve" : "open");
  if (session.ok()) open_.push_back({(*session)->id(), plain, *session});
}

void SessionModelTest::Fork() {
  if (open_.empty()) return;
  const Pair parent = open_[static_cast<std::size_t>(UpTo(std::ssize(open_) - 1))];
  const std::shared_ptr<Session> session = Find(parent);
  if (session == nullptr) return;
  std::optional<std::int64_t> length;
  if (Percent(80)) length = UpTo(400);
  const auto count = static_cast<std::uint32_t>(UpTo(3));
  Outcome expected;
  std::vector<std::shared_ptr<PlainSession>> plain;
  for (std::uint32_t i = 0; expected.ok() && i < std::max(count, 1u); ++i) {
    plain.push_back(std::make_shared<PlainSession>());
    expected =
        model_.Fork(*parent.plain, RulesOf(parent.plain->model), length, fixture_.now(), *plain[i]);
  }
  if (expected.ok() && open_.size() + plain.size() > kMaxSessions) {
    expected = {absl::StatusCode::kResourceExhausted, "TOO_MANY_SESSIONS"};
  }
  const auto forks = fixture_.table().Fork(*session, length, count);
  Expect(expected, forks.status(), "fork");
  if (!forks.ok() || !expected.ok()) return;
  ASSERT_EQ(forks->size(), plain.size());
  for (std::size_t i = 0; i < plain.size(); ++i) {
    open_.push_back({(*forks)[i]->id(), plain[i], (*forks)[i]});
    Compare(open_.back(), true, {});
  }
  Compare(parent, true, {});
}

void SessionModelTest::Close() {
  if (open_.empty()) return;
  const auto at = UpTo(std::ssize(open_) - 1);
  const Pair closed = open_[static_cast<std::size_t>(at)];
  const std::shared_ptr<Session> session = Find(closed);
  if (session == nullptr) return;
  EXPECT_TRUE(fixture_.table().Close(*session));
  EXPECT_FALSE(fixture_.table().Close(*session));
  EXPECT_FALSE(session->BeginUse());
  gone_.push_back(closed.id);
  open_.erase(open_.begin() + at);
}

void SessionModelTest::Expire() {
  fixture_.Advance(static_cast<double>(UpTo(100)));
  fixture_.table().Expire();
  ExpirePlain();
  if (gone_.empty()) return;
  const std::string& id = gone_[static_cast<std::size_t>(UpTo(std::ssize(gone_) - 1))];
  Expect({absl::StatusCode::kNotFound, "SESSION_NOT_FOUND"}, fixture_.table().Find(id).status(),
         "find gone");
}

std::vector<SessionModelTest::Pair> SessionModelTest::PickRows(std::size_t count) {
  std::vector<Pair> rows;
  // Most calls go to a few sessions, which grow long.
  const auto first = static_cast<std::size_t>(UpTo(Percent(75) ? kBusySessions : 1 << 20));
  for (std::size_t i = 0; i < open_.size() && rows.size() < count; ++i) {
    const Pair& pair = open_[(first + i * 7919) % open_.size()];
    const bool again =
        std::any_of(rows.begin(), rows.end(), [&](const Pair& row) { return row.id == pair.id; });
    if (again || (!rows.empty() && pair.plain->model != rows[0].plain->model)) continue;
    // Other cache dtypes come in now and then: such a call is refused.
    if (!rows.empty() && pair.plain->dtype != rows[0].plain->dtype && !Percent(3)) continue;
    rows.push_back(pair);
  }
  return rows;
}

void SessionModelTest::AddRow(const PlainLayer& layer, LayerCall& call) {
  CacheRequest& request = call.request;
  const bool append = request.mode == CacheMode::kAppend;
  std::int64_t start = layer.length();
  std::uint64_t step = 0;
  if (append && Percent(60)) {
    step = layer.last_step + 1 + static_cast<std::uint64_t>(UpTo(2));
    if (Percent(layer.retryable ? 35 : 3)) step = layer.last_step;
    if (Percent(5)) step = static_cast<std::uint64_t>(UpTo(static_cast<std::int64_t>(step)));
    if (step == layer.last_step && layer.retryable && step != 0) start = layer.call_start;
  } else if (!append && Percent(2)) {
    step = 1;
  }
  request.step.push_back(step);
  std::int64_t cut = -1;
  if (Percent(12)) cut = Percent(70) ? std::max<std::int64_t>(start - UpTo(70), 0) : UpTo(start);
  if (Percent(2)) cut = start + 1 + UpTo(3);
  request.truncate.push_back(cut);
  if (cut >= 0) start = cut;
  std::int64_t place = Percent(40) ? start : -1;
  if (Percent(2)) place = start + 1 + UpTo(2);
  if (Percent(2)) place = UpTo(start);
  request.cache_position.push_back(place);
  RowTokens row;
  if (request.mode != CacheMode::kReadOnly && !Percent(5)) {
    const std::int64_t tokens = Percent(30) ? UpTo(150) : UpTo(12);
    for (std::int64_t i = 0; i < tokens; ++i) row.ids.push_back(next_token_++);
  }
  row.queries = std::ssize(row.ids);
  if (Percent(25)) row.queries = UpTo(std::ssize(row.ids) + (Percent(20) ? 30 : 1));
  call.rows.push_back(std::move(row));
}

LayerCall SessionModelTest::MakeCall(const std::string& model, const std::vector<Pair>& rows) {
  LayerCall call;
  const SessionModel::Rules& rules = RulesOf(model);
  call.key = std::next(rules.begin(), UpTo(std::ssize(rules) - 1))->first;
  const PlainLayerRule& rule = rules.at(call.key);
  call.request.mode = Percent(80)   ? CacheMode::kAppend
                      : Percent(50) ? CacheMode::kReadOnly
                                    : CacheMode::kDiscard;
  call.dtype = OneOf(kFloating);
  call.commit = !Percent(6);
  call.dims = rule.dims.known() ? rule.dims : OneOf(kVariants);
  static const PlainLayer kEmpty;
  for (const Pair& pair : rows) {
    const auto found = pair.plain->layers.find(call.key);
    const PlainLayer& layer = found == pair.plain->layers.end() ? kEmpty : found->second;
    if (!rule.dims.known() && layer.dims.known() && Percent(90)) call.dims = layer.dims;
    AddRow(layer, call);
  }
  return call;
}

// Counted apart; what matters is that each of them occurs.
std::string SessionModelTest::KindOf(const LayerCall& call, const Outcome& outcome,
                                     const std::vector<std::uint64_t>& last_steps) {
  if (!outcome.ok()) {
    const bool middle = outcome.reason == "CACHE_BUDGET" && model_.failed_row() > 0;
    return middle ? "call in the middle of a batch" : "call";
  }
  if (call.request.mode == CacheMode::kReadOnly) return "read-only";
  if (call.request.mode == CacheMode::kDiscard) return "discard";
  if (!call.commit) return "cancelled";
  for (std::size_t i = 0; i < last_steps.size(); ++i) {
    if (call.request.step[i] != 0 && call.request.step[i] == last_steps[i]) return "retry";
  }
  return "call";
}

void SessionModelTest::Call() {
  const std::vector<Pair> rows = PickRows(static_cast<std::size_t>(1 + UpTo(3)));
  if (rows.empty()) return;
  const std::string model = rows.front().plain->model;
  std::vector<std::shared_ptr<Session>> sessions;
  std::vector<PlainSession*> plain;
  for (const Pair& row : rows) {
    sessions.push_back(Find(row));
    if (sessions.back() == nullptr) return;
    plain.push_back(row.plain.get());
  }
  const LayerCall call = MakeCall(model, rows);
  std::vector<std::uint64_t> last_steps;
  for (const PlainSession* session : plain) {
    const auto found = session->layers.find(call.key);
    last_steps.push_back(found == session->layers.end() ? 0 : found->second.last_step);
  }
  const Outcome expected = model_.Run(plain, call, RulesOf(model).at(call.key));
  for (const auto& session : sessions) ASSERT_TRUE(session->BeginUse());
  const auto lengths = fixture_.Run(sessions, call);
  for (const auto& session : sessions) session->EndUse(fixture_.now());
  Expect(expected, lengths.status(), KindOf(call, expected, last_steps));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    Compare(rows[i], false, call.key);
    if (!lengths.ok()) continue;
    const auto found = rows[i].plain->layers.find(call.key);
    EXPECT_EQ((*lengths)[i], found == rows[i].plain->layers.end() ? 0 : found->second.length());
  }
}

void SessionModelTest::CompareLayer(const PlainLayer& plain, const LayerCache& layer) {
  EXPECT_EQ(layer.length, plain.length());
  EXPECT_EQ(layer.first_token, plain.first_token);
  EXPECT_EQ(layer.last_step, plain.last_step);
  EXPECT_EQ(layer.dims.known(), plain.dims.known());
  EXPECT_EQ(layer.dims.dtype, plain.dims.dtype);
  ASSERT_EQ(layer.blocks.size(), plain.blocks.size());
  for (std::size_t i = 0; i < plain.blocks.size(); ++i) {
    ASSERT_EQ(static_cast<bool>(layer.blocks[i]), plain.blocks[i] != nullptr) << "block " << i;
    ASSERT_EQ(layer.blocks[i].owners(), plain.blocks[i].use_count()) << "block " << i;
  }
}

// The contents of all layers, or of `key` alone.
void SessionModelTest::Compare(const Pair& pair, bool all_contents, const CacheKey& key) {
  const Session& session = *pair.session;
  const auto& layers = SessionInspector::Layers(session);
  std::uint64_t bytes = 0;
  std::size_t shown = 0;
  for (const auto& [layer_key, plain] : pair.plain->layers) {
    SCOPED_TRACE(absl::StrCat("layer ", layer_key.layer, " of ", pair.plain->model));
    const auto layer = layers.find(layer_key);
    ASSERT_NE(layer, layers.end());
    CompareLayer(plain, layer->second);
    if (all_contents || layer_key == key) {
      EXPECT_EQ(SessionFixture::Differs(session, layer_key, plain.tokens), "");
    }
    for (const auto& block : plain.blocks) bytes += block == nullptr ? 0 : block->bytes;
    shown += plain.dims.known() ? 1 : 0;
  }
  EXPECT_EQ(session.Layers().size(), shown);
  EXPECT_EQ(session.bytes(), bytes);
}

void SessionModelTest::CompareTotals() {
  EXPECT_EQ(fixture_.pool().used(), model_.pool().used);
  EXPECT_EQ(fixture_.pool().blocks(), model_.pool().blocks);
  EXPECT_EQ(fixture_.table().size(), open_.size());
}

// Operations of every kind came to every end that they can come to: a change of the generator that
// loses one of them is noticed.
void SessionModelTest::ExpectVariety() {
  for (const char* const outcome : {"call OK ",
                                    "call ABORTED LATE_STEP",
                                    "call ABORTED CACHE_POSITION_BELOW",
                                    "call FAILED_PRECONDITION CACHE_NEVER_USED",
                                    "call INVALID_ARGUMENT INVALID_FIELD",
                                    "call OUT_OF_RANGE CACHE_POSITION_BEYOND",
                                    "call OUT_OF_RANGE TRUNCATE_BEYOND",
                                    "call OUT_OF_RANGE TOKENS_LET_GO",
                                    "call RESOURCE_EXHAUSTED CACHE_BUDGET",
                                    "call in the middle of a batch RESOURCE_EXHAUSTED CACHE_BUDGET",
                                    "retry OK ",
                                    "read-only OK ",
                                    "discard OK ",
                                    "cancelled OK ",
                                    "fork OK ",
                                    "fork OUT_OF_RANGE TOKENS_LET_GO",
                                    "fork RESOURCE_EXHAUSTED TOO_MANY_SESSIONS",
                                    "open OK ",
                                    "reserve OK ",
                                    "reserve RESOURCE_EXHAUSTED CACHE_BUDGET",
                                    "find expired NOT_FOUND SESSION_NOT_FOUND",
                                    "find gone NOT_FOUND SESSION_NOT_FOUND"}) {
    EXPECT_GE(outcomes_[outcome], 10) << outcome;
    RecordProperty(outcome, outcomes_[outcome]);
  }
}

TEST_F(SessionModelTest, TwentyThousandRandomOperationsAgreeWithThePlainModel) {
  std::cout << "seed " << kSeed << "\n";
  for (int operation = 0; operation < kOperations; ++operation) {
    SCOPED_TRACE(absl::StrCat("operation ", operation, " with seed ", kSeed));
    fixture_.Advance(static_cast<double>(UpTo(3)) / 4);
    const std::int64_t kind = UpTo(99);
    if (kind < 5) {
      Open();
    } else if (kind < 9) {
      Fork();
    } else if (kind < 13) {
      Close();
    } else if (kind < 15) {
      Expire();
    } else {
      Call();
    }
    CompareTotals();
    if (operation % kCompareAllEvery == 0) {
      fixture_.table().Expire();
      ExpirePlain();
      for (const Pair& pair : open_) Compare(pair, true, {});
    }
    if (HasFailure()) break;
  }
  ExpectVariety();
  while (!open_.empty()) Close();
  EXPECT_EQ(fixture_.pool().used(), 0u);
  EXPECT_EQ(fixture_.pool().blocks(), 0u);
}

}  // namespace
}  // namespace attn::testing
