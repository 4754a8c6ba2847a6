#include "client/cpp/retry.h"

#include <gtest/gtest.h>

#include "attention/v1/attention.pb.h"
#include "client/cpp/attnd_client.h"

namespace attn::client {
namespace {

// As a Client returns what attnd itself said.
absl::Status Answered(absl::StatusCode code, double retry_delay = 0) {
  attention::v1::Error error;
  error.set_reason("TEST");
  error.set_retry_delay_seconds(retry_delay);
  absl::Status status(code, "");
  status.SetPayload("type.googleapis.com/attention.v1.Error",
                    absl::Cord(error.SerializeAsString()));
  return status;
}

bool Retried(Repeatable repeatable, const absl::Status& status) {
  return RetryDelay({}, repeatable, status, 1, 0).has_value();
}

TEST(RetryDelayTest, WhatIsWorthAnotherAttempt) {
  using enum absl::StatusCode;
  for (const auto code : {kUnavailable, kDeadlineExceeded, kInternal, kUnknown}) {
    const absl::Status lost(code, "");
    EXPECT_TRUE(Retried(Repeatable::kAll, lost)) << lost;
    EXPECT_FALSE(Retried(Repeatable::kRefusals, lost)) << lost;
    EXPECT_FALSE(Retried(Repeatable::kNothing, lost)) << lost;
  }
  for (const auto repeatable : {Repeatable::kAll, Repeatable::kRefusals}) {
    EXPECT_TRUE(Retried(repeatable, Answered(kResourceExhausted, 0.1)));
    EXPECT_TRUE(Retried(repeatable, Answered(kUnavailable)));
  }
  EXPECT_FALSE(Retried(Repeatable::kNothing, Answered(kResourceExhausted, 0.1)));
  for (const auto code : {kInternal, kUnknown, kResourceExhausted, kAborted, kNotFound, kOutOfRange,
                          kInvalidArgument, kFailedPrecondition, kCancelled}) {
    EXPECT_FALSE(Retried(Repeatable::kAll, Answered(code))) << absl::StatusCodeToString(code);
  }
  EXPECT_FALSE(Retried(Repeatable::kAll, absl::CancelledError("")));
  EXPECT_FALSE(Retried(Repeatable::kAll, absl::ResourceExhaustedError("too large a message")));
}

TEST(RetryDelayTest, GrowsToItsLimitAndIsNeverLessThanTheServersDelay) {
  RetryPolicy policy;
  policy.max_attempts = 5;
  policy.initial_backoff_seconds = 0.5;
  policy.backoff_multiplier = 3;
  policy.max_backoff_seconds = 2;
  const auto delay = [&policy](int attempt, double fraction, double asked) {
    return RetryDelay(policy, Repeatable::kAll, Answered(absl::StatusCode::kUnavailable, asked),
                      attempt, fraction);
  };
  EXPECT_DOUBLE_EQ(*delay(1, 0, 0), 0.5);
  EXPECT_DOUBLE_EQ(*delay(2, 0, 0), 1.5);
  EXPECT_DOUBLE_EQ(*delay(3, 0, 0), 2);
  EXPECT_DOUBLE_EQ(*delay(4, 0.5, 0), 1.75);
  EXPECT_DOUBLE_EQ(*delay(1, 0.5, 7), 7);
  EXPECT_DOUBLE_EQ(*delay(4, 0, 0.1), 2);
  EXPECT_FALSE(delay(5, 0, 0));
}

TEST(RetryDelayTest, AServersNegativeDelayIsNone) {
  EXPECT_GE(*RetryDelay({}, Repeatable::kAll, Answered(absl::StatusCode::kUnavailable, -1), 1, 0),
            0);
}

}  // namespace
}  // namespace attn::client
