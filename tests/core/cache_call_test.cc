// The rules of a call on sessions, one by one, as the API's SessionBatch states them.
#include "core/cache_call.h"

#include <gtest/gtest.h>

#include "tests/core/cache_call_fixture.h"

namespace attn::testing {
namespace {

TEST_F(CacheCallTest, TokensAreAppendedAtAnyPlaceAndComeBack) {
  const auto session = fixture_.Open("plain");
  Ids all;
  for (const std::int64_t count : {1, 62, 1, 1, 63, 130, 0, 5}) {
    const Ids ids = Range(std::ssize(all) + 1, count);
    all = Joined(all, ids);
    LayerCall call = Tokens("plain", {ids});
    EXPECT_EQ(*fixture_.Run({session}, call), (std::vector<std::int64_t>{std::ssize(all)}));
    EXPECT_EQ(Differs(session, all), "");
  }
  EXPECT_EQ(fixture_.pool().blocks(), 5u);
  EXPECT_EQ(session->bytes(), 5 * kPlainBlock);
  EXPECT_EQ(session->longest_layer(), 263);
  EXPECT_EQ(Layer(*session).last_step, 0u);
}

TEST_F(CacheCallTest, ARetryTakesItsTokensBackAndIsExecutedAgain) {
  const auto session = fixture_.Open("plain");
  Append(session, Range(1, 70), 0, 5);
  Append(session, Range(100, 3), 0, 6);
  Append(session, Range(200, 2), 0, 6);  // whatever it brings this time
  EXPECT_EQ(Differs(session, Joined(Range(1, 70), Range(200, 2))), "");
  Append(session, Range(300, 1), 0, 9);  // numbers need not be consecutive
  Append(session, Range(300, 1), 0, 9);
  Append(session, Range(300, 1), 0, 9);
  EXPECT_EQ(Differs(session, Joined(Joined(Range(1, 70), Range(200, 2)), {300})), "");
  EXPECT_EQ(Layer(*session).last_step, 9u);
  EXPECT_EQ(fixture_.pool().blocks(), 2u);
}

TEST_F(CacheCallTest, ARetryOfACutDoesNotBringTheCutTokensBack) {
  const auto session = fixture_.Open("plain");
  Append(session, Range(1, 80));
  LayerCall call = Tokens("plain", {{500, 501}});
  call.request.step = {1};
  call.request.truncate = {60};
  call.request.cache_position = {60};
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(Run({session}, call).ok());
    EXPECT_EQ(Differs(session, Joined(Range(1, 60), {500, 501})), "");
  }
  // The cut is checked against what is left when the tokens are taken back.
  call.request.truncate = {61};
  call.request.cache_position = {};
  ExpectError(Run({session}, call), absl::StatusCode::kOutOfRange, "TRUNCATE_BEYOND",
              {{"row", "0"}, {"length", "62"}, {"step", "1"}});
  call.request.truncate = {10};
  call.request.cache_position = {10};
  ASSERT_TRUE(Run({session}, call).ok());
  EXPECT_EQ(Differs(session, Joined(Range(1, 10), {500, 501})), "");
}

TEST_F(CacheCallTest, ANumberThatDoesNotRiseIsLate) {
  const auto session = fixture_.Open("plain");
  Append(session, Range(1, 4), 0, 3);
  Append(session, Range(5, 4), 0, 7);
  LayerCall call = Tokens("plain", {{99}});
  for (const std::uint64_t step : {1u, 3u, 6u}) {
    call.request.step = {step};
    ExpectError(Run({session}, call), absl::StatusCode::kAborted, "LATE_STEP",
                {{"row", "0"}, {"length", "8"}, {"step", "7"}});
  }
  Append(session, {9});  // without a number: every earlier one is late, the last one too
  call.request.step = {7};
  ExpectError(Run({session}, call), absl::StatusCode::kAborted, "LATE_STEP",
              {{"row", "0"}, {"length", "9"}, {"step", "7"}});
  EXPECT_EQ(Differs(session, Range(1, 9)), "");
  // On a fork its parent's last number is late too.
  Append(session, {10}, 0, 8);
  const auto forks = fixture_.table().Fork(*session, std::nullopt, 1);
  call.request.step = {8};
  ExpectError(Run({forks->front()}, call), absl::StatusCode::kAborted, "LATE_STEP",
              {{"row", "0"}, {"length", "10"}, {"step", "8"}});
  Append(forks->front(), {11}, 0, 9);
  ASSERT_TRUE(Run({session}, call).ok());  // on the parent it is a retry
  EXPECT_EQ(Differs(session, Joined(Range(1, 9), {99})), "");
  EXPECT_EQ(Differs(forks->front(), Range(1, 11)), "");
}

TEST_F(CacheCallTest, AFailedCallIsNoCall) {
  const auto session = fixture_.Open("plain");
  Append(session, Range(1, 4), 0, 3);
  LayerCall call = Tokens("plain", {{99}});
  call.request.step = {4};
  call.request.cache_position = {77};
  ExpectError(Run({session}, call), absl::StatusCode::kOutOfRange, "CACHE_POSITION_BEYOND",
              {{"row", "0"}, {"length", "4"}, {"step", "3"}});
  Append(session, Range(11, 2), 0, 3);  // so that the one before is still retried
  EXPECT_EQ(Differs(session, {11, 12}), "");
}

TEST_F(CacheCallTest, CachePositionIsCheckedInEveryMode) {
  const auto session = fixture_.Open("plain");
  Append(session, Range(1, 10));
  for (const CacheMode mode : {CacheMode::kAppend, CacheMode::kReadOnly, CacheMode::kDiscard}) {
    LayerCall call = mode == CacheMode::kReadOnly ? Reading("plain", 1) : Tokens("plain", {{20}});
    call.request.mode = mode;
    call.request.truncate = {8};
    call.request.cache_position = {9};
    ExpectError(Run({session}, call), absl::StatusCode::kOutOfRange, "CACHE_POSITION_BEYOND",
                {{"row", "0"}, {"length", "10"}, {"step", "0"}});
    call.request.cache_position = {7};
    ExpectError(Run({session}, call), absl::StatusCode::kAborted, "CACHE_POSITION_BELOW",
                {{"row", "0"}, {"length", "10"}});
    call.request.truncate = {11};
    call.request.cache_position = {-1};
    ExpectError(Run({session}, call), absl::StatusCode::kOutOfRange, "TRUNCATE_BEYOND",
                {{"row", "0"}, {"length", "10"}});
    EXPECT_EQ(Differs(session, Range(1, 10)), "");
  }
}

TEST_F(CacheCallTest, OnlyAppendChangesTheCache) {
  const auto session = fixture_.Open("plain");
  Append(session, Range(1, 70), 0, 2);
  const void* const block = Layer(*session).blocks.back()->data();
  LayerCall discard = Tokens("plain", {Range(500, 80)});
  discard.request.mode = CacheMode::kDiscard;
  discard.request.truncate = {66};
  EXPECT_EQ(*fixture_.Run({session}, discard), (std::vector<std::int64_t>{70}));
  LayerCall reading = Reading("plain", 3);
  reading.request.truncate = {5};
  EXPECT_EQ(*fixture_.Run({session}, reading), (std::vector<std::int64_t>{70}));
  EXPECT_EQ(Differs(session, Range(1, 70)), "");
  EXPECT_EQ(Layer(*session).blocks.back()->data(), block);
  EXPECT_EQ(fixture_.pool().blocks(), 2u);  // what was discarded is free again
  for (LayerCall* const call : {&discard, &reading}) {
    call->request.step = {3};
    ExpectError(Run({session}, *call), absl::StatusCode::kInvalidArgument, "INVALID_FIELD",
                {{"field", "past_key_value.sessions.step"}});
  }
  Append(session, Range(1, 70), 0, 2);  // neither has made the last call another one
  EXPECT_EQ(Differs(session, Range(1, 70)), "");
}

TEST_F(CacheCallTest, ACutAloneAndAnAppendWithoutAQuestion) {
  const auto session = fixture_.Open("plain");
  LayerCall call = Tokens("plain", {Range(1, 130)});
  call.rows[0].queries = 0;
  ASSERT_TRUE(Run({session}, call).ok());
  EXPECT_EQ(Differs(session, Range(1, 130)), "");
  call.rows[0].ids.clear();
  call.request.truncate = {64};
  ASSERT_TRUE(Run({session}, call).ok());
  EXPECT_EQ(Differs(session, Range(1, 64)), "");
  EXPECT_EQ(fixture_.pool().blocks(), 1u);
  call.request.truncate = {0};
  ASSERT_TRUE(Run({session}, call).ok());
  EXPECT_EQ(fixture_.pool().blocks(), 0u);
  EXPECT_EQ(session->Layers().size(), 1u);  // it has held some
}

TEST_F(CacheCallTest, ListsHaveAnEntryForEachRowOrNone) {
  const Sessions sessions = {fixture_.Open("plain"), fixture_.Open("plain")};
  const LayerCall good = Tokens("plain", {{1}, {2}});
  for (const std::string name : {"truncate", "cache_position", "step"}) {
    LayerCall call = good;
    if (name == "truncate") call.request.truncate = {0};
    if (name == "cache_position") call.request.cache_position = {0, 0, 0};
    if (name == "step") call.request.step = {1};
    ExpectError(Run(sessions, call), absl::StatusCode::kInvalidArgument, "INVALID_FIELD",
                {{"field", ("past_key_value.sessions." + name).c_str()}});
  }
  for (const bool truncate : {true, false}) {
    LayerCall call = good;
    (truncate ? call.request.truncate : call.request.cache_position) = {-1, -2};
    EXPECT_EQ(Run(sessions, call).code(), absl::StatusCode::kInvalidArgument);
  }
  LayerCall call = good;
  call.rows.pop_back();  // two sessions, a batch of one
  EXPECT_EQ(ErrorDetailsOf(Run(sessions, call))["field"], "past_key_value.sessions.session_ids");
  EXPECT_EQ(fixture_.pool().blocks(), 0u);
}

TEST_F(CacheCallTest, OneBadRowLeavesAllRowsAsTheyWere) {
  const Sessions sessions = {fixture_.Open("plain"), fixture_.Open("plain"),
                             fixture_.Open("plain")};
  LayerCall call = Tokens("plain", {Range(1, 70), Range(101, 3), {}});
  call.request.step = {1, 1, 0};
  ASSERT_TRUE(Run(sessions, call).ok());
  call = Tokens("plain", {{71}, {104}, {201}});
  call.request.cache_position = {70, 3, 1};
  ExpectError(Run(sessions, call), absl::StatusCode::kOutOfRange, "CACHE_POSITION_BEYOND",
              {{"row", "2"}, {"length", "0"}});
  call.request.cache_position = {};
  call.request.step = {2, 2, 1};
  call.rows[2].ids = Range(1, 64 * 900);  // beyond the budget, behind two rows that fit
  const absl::Status full = Run(sessions, call);
  ExpectError(full, absl::StatusCode::kResourceExhausted, "CACHE_BUDGET", {});
  EXPECT_EQ(Differs(sessions[0], Range(1, 70)), "");
  EXPECT_EQ(Differs(sessions[1], Range(101, 3)), "");
  EXPECT_EQ(Differs(sessions[2], {}), "");
  EXPECT_EQ(fixture_.pool().blocks(), 3u);
  EXPECT_EQ(fixture_.pool().used(), 3 * kPlainBlock);
  call.rows[2].ids = {201};
  ASSERT_TRUE(Run(sessions, call).ok());
  EXPECT_EQ(Differs(sessions[2], {201}), "");
}

TEST_F(CacheCallTest, AForkInTheMiddleOfAPageSharesItUntilOneOfThemWrites) {
  const auto parent = fixture_.Open("plain");
  Append(parent, Range(1, 100));
  const auto forks = *fixture_.table().Fork(*parent, 80, 2);
  EXPECT_EQ(fixture_.pool().blocks(), 2u);
  EXPECT_EQ(Layer(*parent).blocks[1].owners(), 3);
  Append(forks[0], {1000});
  Append(parent, {101});
  EXPECT_EQ(fixture_.pool().blocks(), 4u);
  EXPECT_EQ(Layer(*forks[1]).blocks[1].owners(), 1);
  EXPECT_EQ(Layer(*parent).blocks[0].owners(), 3);
  EXPECT_EQ(Differs(parent, Range(1, 101)), "");
  EXPECT_EQ(Differs(forks[0], Joined(Range(1, 80), {1000})), "");
  EXPECT_EQ(Differs(forks[1], Range(1, 80)), "");
  const void* const page = Layer(*forks[1]).blocks[1]->data();
  Append(forks[1], {2000});  // it is the only owner now
  EXPECT_EQ(Layer(*forks[1]).blocks[1]->data(), page);
  EXPECT_EQ(fixture_.pool().blocks(), 4u);
  fixture_.table().Close(*parent);
  EXPECT_EQ(Layer(*forks[0]).blocks[0].owners(), 2);
  EXPECT_EQ(Differs(forks[0], Joined(Range(1, 80), {1000})), "");
}

TEST_F(CacheCallTest, ADiscardOnASharedPageLeavesItAlone) {
  const auto parent = fixture_.Open("plain");
  Append(parent, Range(1, 10));
  const auto fork = fixture_.table().Fork(*parent, std::nullopt, 1)->front();
  LayerCall call = Tokens("plain", {{500, 501}, {600}});
  call.request.mode = CacheMode::kDiscard;
  ASSERT_TRUE(Run({parent, fork}, call).ok());
  EXPECT_EQ(Layer(*parent).blocks[0].owners(), 2);
  call.request.mode = CacheMode::kAppend;
  ASSERT_TRUE(Run({parent, fork}, call).ok());  // both in one call
  EXPECT_EQ(Differs(parent, Joined(Range(1, 10), {500, 501})), "");
  EXPECT_EQ(Differs(fork, Joined(Range(1, 10), {600})), "");
}

TEST_F(CacheCallTest, ForkedLayersThatHoldLessAreSharedWhole) {
  const auto parent = fixture_.Open("plain");
  Append(parent, Range(1, 100), 0);
  Append(parent, Range(1, 30), 1);
  const auto fork = fixture_.table().Fork(*parent, 50, 1)->front();
  EXPECT_EQ(Differs(fork, Range(1, 50), 0), "");
  EXPECT_EQ(Differs(fork, Range(1, 30), 1), "");
  EXPECT_EQ(Differs(parent, Range(1, 100), 0), "");
}

TEST_F(CacheCallTest, CrossAttentionCachesAreSharedWholeAndLetNothingGo) {
  const auto parent = fixture_.Open("windows");
  const CacheKey cross = {"", 0, AttentionKind::kCross};
  LayerCall call;
  call.key = cross;
  call.dims = fixture_.DimsOfLayer("windows", cross);
  call.rows = {{Range(1, 300), 2}};
  ASSERT_TRUE(Run({parent}, call).ok());
  const auto fork = fixture_.table().Fork(*parent, 10, 1)->front();
  EXPECT_EQ(SessionFixture::Differs(*fork, cross, Range(1, 300)), "");
  EXPECT_EQ(SessionInspector::Layers(*fork).at(cross).first_token, 0);
  call.request.mode = CacheMode::kReadOnly;
  call.rows = {{{}, 5}};
  EXPECT_TRUE(Run({fork}, call).ok());
}

TEST_F(CacheCallTest, WithoutAModelTheFirstAppendDecides) {
  const auto session = fixture_.Open("");
  ExpectError(Run({session}, Reading("", 1)), absl::StatusCode::kFailedPrecondition,
              "CACHE_NEVER_USED", {{"row", "0"}});
  LayerCall discard = Tokens("", {{1, 2}}, 3);
  discard.dims = {1, 5, 1, DType::kUnspecified};
  discard.request.mode = CacheMode::kDiscard;
  ASSERT_TRUE(Run({session}, discard).ok());
  EXPECT_TRUE(session->Layers().empty());
  LayerCall call = Tokens("", {{1, 2}}, 3);
  call.dtype = DType::kFloat16;
  ASSERT_TRUE(Run({session}, call).ok());
  EXPECT_EQ(Layer(*session, 3).dims.dtype, DType::kFloat16);
  EXPECT_EQ(Layer(*session, 3).dims.num_kv_heads, 2);
  call.dtype = DType::kFloat32;  // queries may have another dtype than the cache
  ASSERT_TRUE(Run({session}, call).ok());
  EXPECT_EQ(Differs(session, {1, 2, 1, 2}, 3), "");
  call.dims = {1, 3, 4, DType::kUnspecified};
  ExpectError(Run({session}, call), absl::StatusCode::kInvalidArgument, "INVALID_FIELD",
              {{"field", "key"}});
  call.dims = {2, 3, 2, DType::kUnspecified};
  ExpectError(Run({session}, call), absl::StatusCode::kInvalidArgument, "INVALID_FIELD",
              {{"field", "value"}});
  // Other layers have dimensions of their own, but the session's dtype.
  LayerCall other = Tokens("", {{7}}, 1023);
  other.dims = {1, 5, 1, DType::kUnspecified};
  ASSERT_TRUE(Run({session}, other).ok());
  EXPECT_EQ(Layer(*session, 1023).dims.dtype, DType::kFloat16);
  other.key.layer = 1024;
  EXPECT_EQ(ErrorDetailsOf(Run({session}, other))["field"], "layer.layer");
  other.key = {"decoder", 0, AttentionKind::kSelf};
  EXPECT_EQ(ErrorDetailsOf(Run({session}, other))["field"], "layer.stack");
}

TEST_F(CacheCallTest, Int8CachesAreCopiedCutAndLetGoAsOthers) {
  const std::uint64_t plain = 64 * (8 + 16) + 2 * 64 * 4;  // 5 dimensions padded, and the scales
  const auto session = fixture_.Open("plain", {.cache_dtype = DType::kInt8});
  Append(session, Range(1, 70));
  EXPECT_EQ(Layer(*session).dims.dtype, DType::kInt8);
  EXPECT_EQ(Differs(session, Range(1, 70)), "");
  EXPECT_EQ(fixture_.pool().used(), 2 * plain);
  // A fork writes into the middle of a block that it shared: four tokens of a value lie together.
  const auto fork = fixture_.table().Fork(*session, 67, 1)->front();
  Append(fork, Range(900, 3));
  EXPECT_EQ(Differs(fork, Joined(Range(1, 67), Range(900, 3))), "");
  EXPECT_EQ(Differs(session, Range(1, 70)), "");
  EXPECT_EQ(fixture_.pool().used(), 3 * plain);
  // Cut, and written over.
  LayerCall call = Tokens("plain", {Range(500, 80)});
  call.request.truncate = {3};
  ASSERT_TRUE(Run({session}, call).ok());
  EXPECT_EQ(Differs(session, Joined(Range(1, 3), Range(500, 80))), "");
  EXPECT_EQ(Differs(fork, Joined(Range(1, 67), Range(900, 3))), "");
  // A window of 20, and 64 tokens that can be cut again.
  const auto window = fixture_.Open("windows", {.cache_dtype = DType::kInt8});
  for (std::int64_t at = 1; at < 400; at += 50) Append(window, Range(at, 50));
  EXPECT_EQ(Differs(window, Range(1, 400)), "");
  EXPECT_GT(Layer(*window).first_token, 200);
  EXPECT_FALSE(Layer(*window).blocks.front());
}

TEST_F(CacheCallTest, SessionsOfACallHaveTheSameDtypeAndDimensions) {
  const auto half = fixture_.Open("", {.cache_dtype = DType::kFloat16});
  const auto brain = fixture_.Open("", {.cache_dtype = DType::kBFloat16});
  const auto any = fixture_.Open("");
  EXPECT_EQ(ErrorDetailsOf(Run({half, brain}, Tokens("", {{1}, {2}})))["field"],
            "past_key_value.sessions.session_ids");
  EXPECT_EQ(fixture_.pool().blocks(), 0u);
  ASSERT_TRUE(Run({any, half}, Tokens("", {{1}, {2}})).ok());  // takes the other's
  EXPECT_EQ(Layer(*any).dims.dtype, DType::kFloat16);
  LayerCall call = Tokens("", {{3}}, 1);
  call.dims = {2, 5, 5, DType::kUnspecified};
  ASSERT_TRUE(Run({half}, call).ok());
  call = Tokens("", {{3}}, 1);
  ASSERT_TRUE(Run({any}, call).ok());
  call = Tokens("", {{4}, {5}}, 1);
  EXPECT_EQ(ErrorDetailsOf(Run({any, half}, call))["field"], "past_key_value.sessions.session_ids");
  const auto narrow = fixture_.Open("windows", {.cache_dtype = DType::kFloat32});
  EXPECT_EQ(ErrorDetailsOf(
                Run({narrow, fixture_.Open("windows")}, Tokens("windows", {{1}, {2}})))["field"],
            "past_key_value.sessions.session_ids");
}

TEST_F(CacheCallTest, WhatIsGivenUpAfterItsTokensWereWrittenHasChangedNothing) {
  const auto session = fixture_.Open("plain");
  LayerCall call = Tokens("plain", {Range(1, 70)});
  call.commit = false;
  ASSERT_TRUE(Run({session}, call).ok());
  EXPECT_TRUE(session->Layers().empty());
  EXPECT_EQ(fixture_.pool().used(), 0u);
  Append(session, Range(1, 70), 0, 1);
  call = Tokens("plain", {Range(500, 100)});
  call.commit = false;
  call.request.step = {1};
  ASSERT_TRUE(Run({session}, call).ok());  // a retry that is given up
  call.request.step = {2};
  ASSERT_TRUE(Run({session}, call).ok());
  EXPECT_EQ(Differs(session, Range(1, 70)), "");
  EXPECT_EQ(Layer(*session).last_step, 1u);
  EXPECT_EQ(fixture_.pool().blocks(), 2u);
  Append(session, Range(1, 71), 0, 1);
  EXPECT_EQ(Differs(session, Range(1, 71)), "");
}

}  // namespace
}  // namespace attn::testing
