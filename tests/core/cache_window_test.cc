// What a layer's window lets go of, and what must be kept for retries and rollbacks.
#include <gtest/gtest.h>

#include "core/cache_call.h"
#include "tests/core/cache_call_fixture.h"

namespace attn::testing {
namespace {

using CacheWindowTest = CacheCallTest;

TEST_F(CacheWindowTest, AWindowLetsBlocksGoThatNeitherARetryNorARollbackCanSee) {
  const auto session = fixture_.Open("windows", {.rollback_tokens = 10});
  // Window 20: the retry's first query, at 90, sees from 70 on.
  Append(session, Range(1, 90), 0, 1);
  EXPECT_EQ(Layer(*session).first_token, 0);
  Append(session, Range(91, 100), 0, 2);
  EXPECT_EQ(Layer(*session).first_token, 64);
  EXPECT_FALSE(Layer(*session).blocks[0]);
  EXPECT_EQ(Differs(session, Range(1, 190)), "");
  Append(session, Range(91, 100), 0, 2);
  EXPECT_EQ(Differs(session, Range(1, 190)), "");
  // After a step of one token the next block goes: a rollback to 181 sees from 161 on.
  Append(session, {191}, 0, 3);
  EXPECT_EQ(Layer(*session).first_token, 128);
  EXPECT_EQ(session->Layers()[0].first_token, 128);
  EXPECT_EQ(session->bytes(), Layer(*session).blocks[2]->bytes());
  // Other layers keep what they see.
  Append(session, Range(1, 190), 2);
  EXPECT_EQ(Layer(*session, 2).first_token, 0);
}

TEST_F(CacheWindowTest, WhatARollbackNeedsIsKept) {
  const auto session = fixture_.Open("windows", {.rollback_tokens = 10});
  for (int i = 1; i <= 200; ++i) {
    Append(session, {i});
    LayerCall call = Tokens("windows", {{-1}});
    call.request.mode = CacheMode::kDiscard;
    call.request.truncate = {std::max(i - 10, 0)};
    ASSERT_TRUE(Run({session}, call).ok()) << i;
  }
  EXPECT_EQ(Layer(*session).first_token, 128);  // 200 - 10 - 20 lies in block 2
}

TEST_F(CacheWindowTest, AQueryThatWouldSeeTokensThatWereLetGoIsOutOfRangeInEveryMode) {
  const auto session = fixture_.Open("windows", {.rollback_tokens = 1});
  Append(session, Range(1, 190));
  Append(session, {191});
  ASSERT_EQ(Layer(*session).first_token, 128);
  const std::uint64_t used = fixture_.pool().used();
  // The query at 147 sees 127.
  for (const CacheMode mode : {CacheMode::kAppend, CacheMode::kDiscard, CacheMode::kReadOnly}) {
    const bool reads = mode == CacheMode::kReadOnly;
    LayerCall call = reads ? Reading("windows", 1) : Tokens("windows", {{500}});
    call.request.mode = mode;
    call.request.truncate = {reads ? 148 : 147};
    ExpectError(Run({session}, call), absl::StatusCode::kOutOfRange, "TOKENS_LET_GO",
                {{"row", "0"}, {"first_position", "128"}});
    EXPECT_EQ(Differs(session, Range(1, 191)), "");
    EXPECT_EQ(fixture_.pool().used(), used);
    if (mode == CacheMode::kAppend) continue;
    call.request.truncate = {reads ? 149 : 148};
    EXPECT_TRUE(Run({session}, call).ok());
  }
  LayerCall wide = Reading("windows", 1);
  wide.request_window = 63;  // 190 - 63
  ExpectError(Run({session}, wide), absl::StatusCode::kOutOfRange, "TOKENS_LET_GO", {});
  wide.request_window = 62;
  EXPECT_TRUE(Run({session}, wide).ok());
  // Without a question nothing is seen.
  LayerCall cut = Tokens("windows", {{}});
  cut.request.truncate = {100};
  ASSERT_TRUE(Run({session}, cut).ok());
  EXPECT_EQ(Layer(*session).first_token, 100);
  EXPECT_EQ(Layer(*session).length, 100);
  ExpectError(fixture_.table().Fork(*session, std::nullopt, 1).status(),
              absl::StatusCode::kOutOfRange, "TOKENS_LET_GO", {{"first_position", "100"}});
  Append(session, {}, 0);
  cut.request.truncate = {0};
  ASSERT_TRUE(Run({session}, cut).ok());
  Append(session, Range(1, 40));
  EXPECT_EQ(Differs(session, Range(1, 40)), "");
}

TEST_F(CacheWindowTest, ARequestsOwnWindowLetsNothingGo) {
  const auto session = fixture_.Open("windows", {.rollback_tokens = 1});
  LayerCall call = Tokens("windows", {Range(1, 300)}, 2);
  call.request_window = 3;
  ASSERT_TRUE(Run({session}, call).ok());
  call = Tokens("windows", {{301}}, 2);
  call.request_window = 3;
  ASSERT_TRUE(Run({session}, call).ok());
  EXPECT_EQ(Layer(*session, 2).first_token, 0);
  EXPECT_EQ(Differs(session, Range(1, 301), 2), "");
}

TEST_F(CacheWindowTest, AForkWhoseNextQueryWouldSeeWhatIsGoneIsOutOfRange) {
  const auto session = fixture_.Open("windows", {.rollback_tokens = 1});
  Append(session, Range(1, 190));
  Append(session, {191});
  ExpectError(fixture_.table().Fork(*session, 147, 1).status(), absl::StatusCode::kOutOfRange,
              "TOKENS_LET_GO", {{"length", "191"}, {"first_position", "128"}});
  const auto fork = fixture_.table().Fork(*session, 148, 1)->front();
  Append(fork, {500});
  EXPECT_EQ(Differs(fork, Joined(Range(1, 148), {500})), "");
  EXPECT_EQ(fixture_.table().size(), 2u);
}

}  // namespace
}  // namespace attn::testing
