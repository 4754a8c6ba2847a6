// Sessions as a table: ids, time to live, listing, forks, memory that is set aside.
#include "core/session_table.h"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>
#include <set>

#include "core/error.h"
#include "tests/core/session_fixture.h"

namespace attn::testing {
namespace {

// Of layer 0 of "plain": 64 tokens in float16, values of 5 columns padded to 16.
constexpr std::uint64_t kPlainBlock = 64 * (5 + 16) * 2;
constexpr std::uint64_t kCacheBytes = 819 * kPlainBlock;

class SessionTableTest : public ::testing::Test {
 protected:
  std::vector<std::int64_t> Ids(std::int64_t count) {
    std::vector<std::int64_t> ids(static_cast<std::size_t>(count));
    std::iota(ids.begin(), ids.end(), 1);
    return ids;
  }
  // Appends tokens without a question to a layer of a session of "plain".
  absl::Status Append(const std::shared_ptr<Session>& session, std::int64_t count,
                      std::uint32_t layer = 0) {
    LayerCall call;
    call.key.layer = layer;
    call.dims = {1, 5, 5, DType::kUnspecified};
    call.rows = {{Ids(count), 0}};
    return fixture_.Run({session}, call).status();
  }
  SessionTable& table() { return fixture_.table(); }
  std::string FindReason(const std::string& id) { return ErrorReason(table().Find(id).status()); }

  SessionFixture fixture_{kCacheBytes, 8};
};

// Forks around few blocks can have large tables of them.
TEST(SessionTables, ForksPageTablesAreBounded) {
  SessionFixture fixture(kCacheBytes);
  std::vector<std::int64_t> ids(64 * 800);
  std::iota(ids.begin(), ids.end(), 1);
  LayerCall call;
  call.dims = {1, 5, 5, DType::kUnspecified};
  call.rows = {{ids, 0}};
  const std::shared_ptr<Session> parent = fixture.Open("plain");
  ASSERT_TRUE(fixture.Run({parent}, call).ok());
  const CachePool& cache = fixture.table().cache();
  const std::uint64_t used = cache.used();
  std::vector<std::shared_ptr<Session>> forks;
  absl::Status refused;
  for (int i = 0; i < 8 && refused.ok(); ++i) {
    auto made = fixture.table().Fork(*parent, std::nullopt, 1000);
    refused = made.status();
    if (made.ok()) forks.insert(forks.end(), made->begin(), made->end());
  }
  EXPECT_EQ(ErrorReason(refused), "CACHE_BUDGET") << refused;
  EXPECT_GE(forks.size(), 1000u);
  EXPECT_EQ(cache.used(), used);  // no block more
  const std::uint64_t tables = cache.tables();
  EXPECT_GT(tables, forks.size() * 800 * sizeof(void*));  // a refused call's share was given back
  for (const std::shared_ptr<Session>& fork : forks) EXPECT_TRUE(fixture.table().Close(*fork));
  EXPECT_LT(cache.tables(), tables / 1000);
  EXPECT_TRUE(fixture.table().Fork(*parent, std::nullopt, 1).ok());
}

TEST_F(SessionTableTest, IdsAreLongAndDifferent) {
  std::set<std::string> ids;
  for (int i = 0; i < 8; ++i) ids.insert(fixture_.Open("")->id());
  EXPECT_EQ(ids.size(), 8u);
  for (const std::string& id : ids) EXPECT_EQ(id.size(), 32u);  // 128 bits
}

TEST_F(SessionTableTest, WhatNeverWasIsClosedOrExpiredLooksTheSame) {
  const std::string closed = fixture_.Open("")->id();
  ASSERT_TRUE(table().Close(**table().Find(closed)));
  const std::string expired = fixture_.Open("", {.time_to_live_seconds = 5.0})->id();
  fixture_.Advance(5.5);
  std::string misspelt = fixture_.Open("")->id();
  misspelt.back() = misspelt.back() == '0' ? '1' : '0';
  for (const std::string& id : {closed, expired, misspelt, std::string(), std::string("x")}) {
    const absl::Status status = table().Find(id).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kNotFound) << id;
    EXPECT_EQ(status, SessionTable::NotFound()) << id;
  }
  EXPECT_EQ(table().events().expired, 1u);
  EXPECT_EQ(table().events().closed, 1u);
  EXPECT_EQ(table().events().opened, 3u);
}

TEST_F(SessionTableTest, ASessionLivesAsLongAsItIsTouchedWithinItsTime) {
  const std::string id = fixture_.Open("", {.time_to_live_seconds = 5.0})->id();
  for (int i = 0; i < 4; ++i) {
    fixture_.Advance(5.0);
    table().Expire();
    EXPECT_EQ(*table().IdleSeconds(id, fixture_.now()), 5.0);  // which does not touch it
    EXPECT_TRUE(table().Find(id).ok());
  }
  fixture_.Advance(5.25);
  table().Expire();
  EXPECT_EQ(table().size(), 0u);
  EXPECT_EQ(table().IdleSeconds(id, fixture_.now()), std::nullopt);
}

TEST_F(SessionTableTest, OneInUseNeitherExpiresNorLosesWhatItHoldsWhenItIsClosed) {
  const std::shared_ptr<Session> session = fixture_.Open("plain", {.time_to_live_seconds = 1.0});
  ASSERT_TRUE(session->BeginUse());
  fixture_.Advance(100.0);
  table().Expire();
  EXPECT_TRUE(table().Find(session->id()).ok());
  ASSERT_TRUE(Append(session, 10).ok());
  EXPECT_TRUE(table().Close(*session));
  EXPECT_FALSE(session->BeginUse());
  EXPECT_EQ(fixture_.pool().blocks(), 1u);
  ASSERT_TRUE(Append(session, 60).ok());  // the call that uses it goes on
  EXPECT_EQ(fixture_.pool().blocks(), 2u);
  session->EndUse(fixture_.now());
  EXPECT_EQ(fixture_.pool().blocks(), 0u);
  EXPECT_EQ(fixture_.pool().used(), 0u);
}

TEST_F(SessionTableTest, ACallsEndStartsTheTimeToLiveAnew) {
  const std::shared_ptr<Session> session = fixture_.Open("", {.time_to_live_seconds = 10.0});
  ASSERT_TRUE(session->BeginUse());
  fixture_.Advance(100.0);
  session->EndUse(fixture_.now());
  fixture_.Advance(9.0);
  table().Expire();
  EXPECT_EQ(session->idle_seconds(fixture_.now()), 9.0);
  EXPECT_EQ(session->age_seconds(fixture_.now()), 109.0);
  EXPECT_FALSE(session->closed());
  fixture_.Advance(2.0);
  table().Expire();
  EXPECT_TRUE(session->closed());
}

TEST_F(SessionTableTest, OptionsOutOfRangeAreRefusedByName) {
  const auto field = [&](const std::string& model, const SessionOptions& options) {
    return ErrorDetailsOf(table().Open(fixture_.Pool(model), options).status())["field"];
  };
  EXPECT_EQ(field("", {.time_to_live_seconds = -1.0}), "time_to_live_seconds");
  EXPECT_EQ(field("", {.time_to_live_seconds = 1e9}), "time_to_live_seconds");
  EXPECT_EQ(field("", {.time_to_live_seconds = std::numeric_limits<double>::quiet_NaN()}),
            "time_to_live_seconds");
  EXPECT_EQ(field("", {.reserve_tokens = 1}), "reserve_tokens");
  EXPECT_EQ(field("plain", {.reserve_tokens = std::uint64_t{1} << 63}), "reserve_tokens");
  EXPECT_EQ(field("", {.cache_dtype = DType::kInt64}), "cache_dtype");
  EXPECT_EQ(field("plain", {.cache_dtype = DType::kBool}), "cache_dtype");
  EXPECT_EQ(table().size(), 0u);
  EXPECT_EQ(fixture_.Open("")->time_to_live_seconds(), 3600.0);
}

TEST_F(SessionTableTest, ReservedMemoryIsSetAsideAtOnceOrRefused) {
  // Two layers of two blocks each, and one block for a copy.
  const std::shared_ptr<Session> session = fixture_.Open("plain", {.reserve_tokens = 65});
  EXPECT_EQ(fixture_.pool().used(), 5 * kPlainBlock);
  EXPECT_EQ(fixture_.pool().blocks(), 0u);
  const absl::Status refused =
      table().Open(fixture_.Pool("plain"), {.reserve_tokens = 40000}).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(refused), "CACHE_BUDGET");
  EXPECT_EQ(RetryDelay(refused), 0.0);  // never fits
  const absl::Status later =
      table().Open(fixture_.Pool("plain"), {.reserve_tokens = 26000}).status();
  EXPECT_EQ(ErrorReason(later), "CACHE_BUDGET");
  EXPECT_GT(RetryDelay(later), 0.0);  // fits once others' caches are gone

  // What is set aside is there however full the rest is; forks have no part in it.
  const auto rest = fixture_.pool().Reserve(kCacheBytes - fixture_.pool().used());
  ASSERT_TRUE(rest.ok());
  ASSERT_TRUE(Append(session, 128).ok());
  EXPECT_EQ(fixture_.pool().used(), kCacheBytes);
  const auto forks = table().Fork(*session, 100, 1);
  ASSERT_TRUE(forks.ok()) << forks.status();
  EXPECT_EQ(ErrorReason(Append(forks->front(), 1)), "CACHE_BUDGET");
  ASSERT_TRUE(Append(session, 128, 1).ok());
  EXPECT_EQ(ErrorReason(Append(session, 65)), "CACHE_BUDGET");  // two blocks, and one is left
  EXPECT_TRUE(Append(session, 64).ok());
}

TEST_F(SessionTableTest, BlocksOfAReserveOutliveItWithTheForksThatShareThem) {
  const std::shared_ptr<Session> session = fixture_.Open("plain", {.reserve_tokens = 64});
  ASSERT_TRUE(Append(session, 64).ok());
  const auto forks = table().Fork(*session, std::nullopt, 2);
  ASSERT_TRUE(forks.ok());
  table().Close(*session);
  EXPECT_EQ(fixture_.pool().used(), kPlainBlock);  // the rest of the reserve is free again
  table().Close(*forks->front());
  EXPECT_EQ(fixture_.pool().used(), kPlainBlock);
  table().Close(*forks->back());
  EXPECT_EQ(fixture_.pool().used(), 0u);
}

TEST_F(SessionTableTest, ForksAreMadeTogetherOrNotAtAll) {
  const std::shared_ptr<Session> session = fixture_.Open("plain");
  EXPECT_EQ(ErrorReason(table().Fork(*session, std::nullopt, 8).status()), "TOO_MANY_SESSIONS");
  EXPECT_EQ(table().size(), 1u);
  EXPECT_EQ(ErrorDetailsOf(table().Fork(*session, -1, 1).status())["field"], "length");
  EXPECT_EQ(ErrorDetailsOf(table().Fork(*session, std::nullopt, 1025).status())["field"], "count");
  const auto one = table().Fork(*session, std::nullopt, 0);
  ASSERT_TRUE(one.ok());
  EXPECT_EQ(one->size(), 1u);
  EXPECT_EQ(one->front()->time_to_live_seconds(), session->time_to_live_seconds());
  EXPECT_EQ(table().Fork(*session, std::nullopt, 6)->size(), 6u);
  EXPECT_EQ(table().size(), 8u);
  EXPECT_EQ(table().events().forked, 7u);
  EXPECT_EQ(ErrorReason(table().Open(fixture_.Pool(""), {}).status()), "TOO_MANY_SESSIONS");
}

TEST_F(SessionTableTest, SessionsOfAModelEndTogetherAndNoForkIsBornAfterThem) {
  const std::shared_ptr<Session> plain = fixture_.Open("plain");
  const std::shared_ptr<Session> nameless = fixture_.Open("");
  ASSERT_TRUE(Append(plain, 10).ok());
  EXPECT_EQ(table().UsageByModel()["plain"].sessions, 1u);
  EXPECT_EQ(table().UsageByModel()["plain"].bytes, kPlainBlock);
  ASSERT_TRUE(plain->BeginUse());  // a fork that runs while the model is unloaded
  EXPECT_EQ(table().CloseAll(*fixture_.Pool("plain")), 1u);
  EXPECT_EQ(FindReason(plain->id()), "SESSION_NOT_FOUND");
  const absl::Status late = table().Fork(*plain, std::nullopt, 1).status();
  EXPECT_EQ(late.code(), absl::StatusCode::kNotFound);
  plain->EndUse(fixture_.now());
  EXPECT_EQ(table().size(), 1u);
  EXPECT_EQ(fixture_.pool().used(), 0u);
  EXPECT_EQ(FindReason(nameless->id()), "");
}

TEST_F(SessionTableTest, ListsByModelInTheOrderOfOpeningPageByPage) {
  std::vector<std::string> ids;
  for (const char* model : {"", "plain", "", "plain", "plain"}) {
    ids.push_back(fixture_.Open(model)->id());
  }
  const auto first = table().List(std::nullopt, 0, 2);
  ASSERT_EQ(first.size(), 2u);
  EXPECT_EQ(first[1].session->id(), ids[1]);
  table().Close(*first[1].session);  // the page's last session is gone: the next page is not lost
  const auto second = table().List(std::nullopt, first[1].serial, 9);
  ASSERT_EQ(second.size(), 3u);
  EXPECT_EQ(second[0].session->id(), ids[2]);
  EXPECT_TRUE(table().List(std::nullopt, second[2].serial, 9).empty());
  const auto plain = table().List("plain", 0, 9);
  ASSERT_EQ(plain.size(), 2u);
  EXPECT_EQ(plain[0].session->id(), ids[3]);
  EXPECT_EQ(table().List("", 0, 9).size(), 2u);
}

}  // namespace
}  // namespace attn::testing
